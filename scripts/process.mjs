// Child processes of the scripts: live output, and an end that cannot be overlooked.

import { spawn } from 'node:child_process';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The repository's root: every command runs there. */
export const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));

/**
 * Runs a command with its output shown as it comes. `onLine` also hears each line of its stdout; with `hidden` that
 * stdout is only for `onLine`. Gives the exit code; a signal or a command that cannot be started is 1.
 */
export function run(command, args, { onLine, hidden = false, env = {}, cwd = ROOT } = {}) {
  return new Promise((resolve) => {
    const stdio = ['ignore', onLine ? 'pipe' : 'inherit', 'inherit'];
    const child = spawn(command, args, { cwd, stdio, env: { ...process.env, ...env } });
    if (onLine) {
      readLines(child.stdout, (line) => {
        if (!hidden) {
          process.stdout.write(`${line}\n`);
        }
        onLine(line);
      });
    }
    child.on('error', (error) => {
      console.error(`${command} could not be started: ${error.message}`);
      resolve(1);
    });
    child.on('close', (code, signal) => {
      if (signal) {
        console.error(`${command} was ended by ${signal}`);
      }
      resolve(code ?? 1);
    });
  });
}

function readLines(stream, onLine) {
  let rest = '';
  stream.setEncoding('utf8');
  stream.on('data', (text) => {
    const lines = (rest + text).split('\n');
    rest = lines.pop();
    lines.forEach(onLine);
  });
  stream.on('end', () => rest && onLine(rest));
}
