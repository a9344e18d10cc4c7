export type {
  AdapterCase,
  AdapterHarness,
  EngineProbe,
  GateProbe,
  HarnessOptions,
  NativeTransactionProbe,
} from './conformance/adapters.ts'
export { adapterSuite } from './conformance/adapters.ts'
export type {
  FrameworkCase,
  FrameworkHarness,
  SuiteAnswer,
  SuiteApp,
  SuiteDatabase,
  SuiteHandler,
  SuiteRequest,
  SuiteServer,
} from './conformance/frameworks.ts'
export { frameworkSuite } from './conformance/frameworks.ts'
