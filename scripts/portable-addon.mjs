// One addon for glibc and musl. A library that is linked for glibc asks for glibc's loader by name, because the loader
// holds `__tls_get_addr`. In every process that uses glibc the loader is there without being asked for; where musl is
// the C library (Alpine), it answers to the names libc.so.6 and libm.so.6 itself, has the function, and knows nothing by
// the loader's name: that one entry is all that keeps the addon from loading there. So it is taken out.
//
// What musl must then have, name by name, is a test's business (`bindings-node/test/addon.test.ts`).

const PT_LOAD = 1;
const PT_DYNAMIC = 2;
const DT_NEEDED = 1n;
const DT_STRTAB = 5n;
const ENTRY_BYTES = 16;

const GLIBC_LOADER = /^ld-linux(-[\w-]+)?\.so\.\d+$/;

/** Names of the libraries that an ELF file asks for; none when `file` is no 64-bit little-endian ELF file. */
export function neededLibraries(file) {
  return dynamicEntries(file)
    .filter((entry) => entry.tag === DT_NEEDED)
    .map((entry) => entry.name);
}

/** A copy of the file that does not ask for glibc's loader; the same bytes when it never did. */
export function withoutGlibcLoader(file) {
  const entries = dynamicEntries(file);
  const kept = entries.filter((entry) => !(entry.tag === DT_NEEDED && GLIBC_LOADER.test(entry.name)));
  const copy = Buffer.from(file);
  entries.forEach((entry, i) => {
    // The table keeps its size; what is left over at its end becomes the entry that ends it.
    copy.writeBigUInt64LE(kept[i]?.tag ?? 0n, entry.offset);
    copy.writeBigUInt64LE(kept[i]?.value ?? 0n, entry.offset + 8);
  });
  return copy;
}

/** The dynamic section: `{ offset, tag, value, name }`, where `name` is that of a library. */
function dynamicEntries(file) {
  const isElf64 = file.subarray(0, 4).equals(Buffer.from([0x7f, 0x45, 0x4c, 0x46])) && file[4] === 2 && file[5] === 1;
  if (!isElf64) {
    return [];
  }
  const segments = programHeaders(file);
  const dynamic = segments.find((segment) => segment.type === PT_DYNAMIC);
  const entries = [];
  for (let offset = dynamic.offset; offset < dynamic.offset + dynamic.size; offset += ENTRY_BYTES) {
    entries.push({ offset, tag: file.readBigUInt64LE(offset), value: file.readBigUInt64LE(offset + 8) });
  }
  const strings = fileOffset(segments, Number(entries.find((entry) => entry.tag === DT_STRTAB).value));
  for (const entry of entries.filter(({ tag }) => tag === DT_NEEDED)) {
    const start = strings + Number(entry.value);
    entry.name = file.toString('latin1', start, file.indexOf(0, start));
  }
  return entries;
}

function programHeaders(file) {
  const [start, size, count] = [Number(file.readBigUInt64LE(32)), file.readUInt16LE(54), file.readUInt16LE(56)];
  return Array.from({ length: count }, (_, i) => {
    const at = start + i * size;
    const number = (offset) => Number(file.readBigUInt64LE(at + offset));
    return { type: file.readUInt32LE(at), offset: number(8), address: number(16), size: number(32) };
  });
}

/** Where in the file the byte lies that is loaded at `address`. */
function fileOffset(segments, address) {
  const holder = segments.find(
    (segment) => segment.type === PT_LOAD && segment.address <= address && address < segment.address + segment.size,
  );
  return address - holder.address + holder.offset;
}
