export declare function generatePrismaClient(node?: string): void
