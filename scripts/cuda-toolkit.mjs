// Installs the CUDA compiler that kernels are built and checked with into `.cuda/` (271 MB; git ignores it): pinned wheels,
// through pip, nothing system-wide. `kernels/build.rs` (feature `cuda`) and the tests find it there. A GPU is not needed.
//
// NS_LLM_PYTHON names a Python with pip (default: python3).

import { join } from 'node:path';

import { ROOT, run } from './process.mjs';

const FOLDER = join(ROOT, '.cuda');
const WHEELS = [
  'nvidia-cuda-nvcc==13.0.88', // nvcc, ptxas, fatbinary
  'nvidia-nvvm==13.0.88', // the compiler behind nvcc
  'nvidia-cuda-crt==13.0.88', // headers that nvcc includes by itself
  'nvidia-cuda-runtime==13.0.96', // cuda_bf16.h, cuda_fp16.h
  'nvidia-cuda-cccl==13.0.85', // nv/target, which those include
];

const python = process.env.NS_LLM_PYTHON ?? 'python3';
const pip = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps', '--upgrade'];
const code = await run(python, [...pip, '--target', FOLDER, ...WHEELS]);
const nvcc = join(FOLDER, 'nvidia', 'cu13', 'bin', 'nvcc');
process.exitCode = code === 0 ? await run(nvcc, ['--version']) : code;
