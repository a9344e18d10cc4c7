export type {
  AdapterCase,
  AdapterHarness,
  EngineProbe,
  GateProbe,
  HarnessOptions,
  NativeTransactionProbe,
} from './conformance/adapters.ts'
export { adapterSuite } from './conformance/adapters.ts'
