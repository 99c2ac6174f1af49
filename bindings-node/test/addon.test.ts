/** What the built addon asks of its host: so little that glibc and musl (Alpine) both have it. */

import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { pathToFileURL } from 'node:url';

import { ROOT } from './support.js';

const ADDON = join(ROOT, 'bindings-node', 'native.node');

/**
 * Functions of the C library that the addon needs. Each is in musl 1.2 under this name (those that end in 64 for
 * libraries that were linked elsewhere). Look there before a name is added.
 */
const C_LIBRARY = `
  __cxa_finalize __errno_location __tls_get_addr __xpg_strerror_r abort bcmp calloc chmod clock_gettime
  clock_nanosleep close closedir connect cos dirfd dl_iterate_phdr dladdr dlclose dlerror dlopen dlsym exp flock free
  freeaddrinfo fstat64 fstatat64 fsync ftruncate64 gai_strerror getaddrinfo getcwd getenv getpriority getrandom
  getsockopt gettid ioctl log lseek64 lstat64 madvise malloc memcmp memcpy memmove memset mkdir mmap mmap64 munmap
  open open64 opendir pause poll posix_memalign pow pread64 pthread_attr_destroy pthread_attr_init
  pthread_attr_setstacksize pthread_create pthread_detach pthread_join pthread_key_create pthread_key_delete
  pthread_self pthread_setname_np pthread_setspecific read readdir64 readlink realloc realpath recv sched_getaffinity
  sched_yield send setpriority setsockopt sin socket stat64 strlen syscall sysconf unlink write writev`;
/** Of the compiler's library, which Node itself brings, and of Node. */
const OTHER = /^(_Unwind_|napi_)/;

const onLinux = { skip: process.platform !== 'linux' && 'not ELF' };

test('the addon asks for no more libraries than every Linux has, glibc or not', onLinux, async () => {
  const script = pathToFileURL(join(ROOT, 'scripts', 'portable-addon.mjs')).href;
  const { neededLibraries, withoutGlibcLoader } = (await import(script)) as {
    neededLibraries(file: Buffer): string[];
    withoutGlibcLoader(file: Buffer): Buffer;
  };
  const file = readFileSync(ADDON);
  const needed = neededLibraries(file);
  assert.ok(needed.includes('libc.so.6'), String(needed));
  const everywhere = /^(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|libgcc_s\.so\.1)$/;
  assert.deepEqual(needed.filter((name) => !everywhere.test(name)), []);
  assert.ok(withoutGlibcLoader(file).equals(file), 'it was already taken out');
});

test('every function that the addon needs is in glibc and in musl', onLinux, () => {
  const names = neededFunctions();
  assert.ok(names.length > 40, String(names));
  const known = new Set(C_LIBRARY.trim().split(/\s+/));
  assert.deepEqual(names.filter((name) => !known.has(name) && !OTHER.test(name)), []);
});

const withMusl = { skip: spawnSync('musl-gcc', ['--version']).status !== 0 && 'needs musl-gcc (musl-tools)' };

test('the addon loads where musl is the C library, with every function found', withMusl, (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'ns-llm-musl-'));
  t.after(() => rmSync(folder, { recursive: true }));
  const compile = (...args: string[]) => execFileSync('musl-gcc', args, { cwd: folder });
  // In the place of Node, which is no musl's here: what it and the compiler's library would bring.
  const brought = neededFunctions().filter((name) => OTHER.test(name));
  writeFileSync(join(folder, 'brought.c'), brought.map((name) => `void ${name}(void) {}\n`).join(''));
  compile('-shared', '-fPIC', '-o', 'libgcc_s.so.1', 'brought.c');
  writeFileSync(join(folder, 'load.c'), `
    #include <dlfcn.h>
    #include <stdio.h>
    int main(int count, char **arguments) {
      void *addon = count == 2 ? dlopen(arguments[1], RTLD_NOW) : 0;
      puts(addon ? "loaded" : dlerror());
      return !addon || !dlsym(addon, "napi_register_module_v1");
    }`);
  compile('-o', 'load', 'load.c', '-L.', '-l:libgcc_s.so.1');
  const { status, stdout } = spawnSync(join(folder, 'load'), [ADDON], {
    encoding: 'utf8',
    env: { LD_LIBRARY_PATH: folder },
  });
  assert.deepEqual({ status, stdout }, { status: 0, stdout: 'loaded\n' });
});

/** Names of the functions that are not in the addon and have to be found when it is loaded. */
function neededFunctions(): string[] {
  const lines = execFileSync('nm', ['--dynamic', '--undefined-only', ADDON], { encoding: 'utf8' }).trim().split('\n');
  const strong = lines.map((line) => line.trim().split(/\s+/)).filter(([kind]) => kind === 'U');
  return strong.map(([, name = '']) => name.replace(/@.*/, ''));
}
