// The addon's TypeScript declarations, from what napi-derive writes while the Rust side is compiled: one JSON object a
// line, a class as one `struct` and its `impl` blocks.

/** Text of `native.d.ts`. */
export function declarations(typeDef) {
  const entries = typeDef.split('\n').filter(Boolean).map((line) => JSON.parse(line));
  const members = new Map();
  for (const { kind, name, def } of entries) {
    if (kind === 'impl') {
      members.set(name, [...(members.get(name) ?? []), def]);
    }
  }
  const declared = entries.filter(({ kind }) => kind !== 'impl').map((entry) => declaration(entry, members));
  return ['// Generated from bindings-node/src by the build; not kept by hand.', ...declared.sort(), ''].join('\n\n');
}

function declaration({ kind, name, js_doc: doc = '', def }, members) {
  switch (kind) {
    case 'interface':
      return `${doc}export interface ${name} {\n${indent(def)}\n}`;
    case 'struct':
      return `${doc}export declare class ${name} {\n${indent((members.get(name) ?? []).join('\n'))}\n}`;
    default:
      throw new Error(`scripts/declarations.mjs does not know the kind ${kind} of ${name}`);
  }
}

function indent(text) {
  return text
    .split('\n')
    .map((line) => `  ${line.trim()}`)
    .join('\n');
}
