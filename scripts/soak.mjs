// `npm run soak -- --minutes 480 [--seed 1]`: the mixed load of bindings-node/test/soak.ts, a line a minute, the report as
// JSON at the end. The exit code is 0 only when nothing was left over and nothing grew. 480 minutes is the long form.

import { parseArgs } from 'node:util';

import { build } from './build.mjs';

const { values } = parseArgs({
  options: { minutes: { type: 'string', default: '480' }, seed: { type: 'string', default: '1' } },
});
const [minutes, seed] = [Number(values.minutes), Number(values.seed)];
if (!(minutes > 0) || !Number.isInteger(seed)) {
  console.error(`--minutes is ${values.minutes}, must be above 0; --seed is ${values.seed}, must be an integer`);
  process.exit(2);
}
await build();
const { soak } = await import('../bindings-node/dist/test/soak.js');
const report = await soak({ seconds: minutes * 60, seed, onLine: (line) => console.log(line) });
console.log(JSON.stringify(report, null, 2));
if (report.faults.length > 0) {
  console.error(`soak failed: ${report.faults.join('; ')}`);
  process.exitCode = 1;
}
