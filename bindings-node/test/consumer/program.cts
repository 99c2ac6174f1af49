/** A user's program, compiled but never run: the types of the package as `require` sees them. */

import llm = require('ns-llm');
import nsNode = require('ns-llm/ns-node');

export async function answer(): Promise<nsNode.GenerateResult> {
  return new nsNode.default().generate('Once upon a time');
}

export async function tell(): Promise<string> {
  const engine: llm.Engine = await llm.Engine.open();
  const { text, finishReason }: llm.Completion = await engine.generate('Once upon a time');
  await engine.close();
  return finishReason === 'stop' ? text : '';
}
