// "Run it for real" of README.md, every command of it, from an empty folder: only the ports are others, and the program
// is the one that the tests have built.

import assert from 'node:assert/strict';
import { cpSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';

import { Fleet, freePorts, lacks, PROGRAM, ROOT } from './fleet.mjs';

const PORTS = ['8080', '8081', '8082', '8083', '6379'];

test('the commands of "Run it for real" do what is said', { skip: lacks('nginx', 'redis-server', 'curl') }, async () => {
  const chapter = /\n## Run it for real\n([^]*?)\n## /.exec(readFileSync(join(ROOT, 'README.md'), 'utf8'))[1];
  const blocks = [...chapter.matchAll(/```sh\n([^]*?)```/g)].map(([, block]) => block);
  assert.equal(blocks.length, 4);
  assert.match(blocks[0], /^cargo build --release --package ns-llm-cli\n/);
  const fleet = new Fleet();
  const free = await freePorts(PORTS.length);
  const moved = (text) => text.replace('localhost:808[1-3]', '127.0.0.1:{8081,8082,8083}').replace(/\b(8080|8081|8082|8083|6379)\b/g, (port) => String(free[PORTS.indexOf(port)]));
  mkdirSync(join(fleet.folder, 'target', 'release'), { recursive: true });
  symlinkSync(PROGRAM, join(fleet.folder, 'target', 'release', 'ns-llm'));
  symlinkSync(join(ROOT, 'models'), join(fleet.folder, 'models'));
  cpSync(join(ROOT, 'deploy', 'nginx'), join(fleet.folder, 'deploy', 'nginx'), { recursive: true });
  const configuration = join(fleet.folder, 'deploy', 'nginx', 'nginx.conf');
  writeFileSync(configuration, moved(readFileSync(configuration, 'utf8')));
  const said = [];
  try {
    const shell = async (script) => {
      const child = fleet.start('bash', ['-euo', 'pipefail', '-c', script], { cwd: fleet.folder, stdio: ['ignore', 'pipe', 'pipe'] });
      // What runs on behind a script holds its output open: its end is the shell's own.
      const code = await new Promise((resolve) => child.on('exit', resolve));
      assert.equal(code, 0, `${script}\n${child.said}`);
      return child.said;
    };
    for (const block of blocks) {
      said.push(await shell(moved(block.replace(/^cargo build.*\n/, ''))));
    }
    const cached = said[1].match(/"cached_tokens":\d+/g).map((text) => Number(text.split(':')[1]));
    assert.equal(cached.length, 2);
    assert.ok(cached[1] >= 16 && cached[1] > cached[0] - 1, `${cached}`);
    assert.match(readFileSync(join(fleet.folder, 'target', 'fleet', 'answer.json'), 'utf8'), /"finish_reason":/);
  } finally {
    if (said.length < blocks.length) {
      const last = fleet.start('bash', ['-c', 'kill -9 $(cat target/fleet/*.pid)'], { cwd: fleet.folder });
      await last.ended;
    }
    await fleet.stop();
  }
});
