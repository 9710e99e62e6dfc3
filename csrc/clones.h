// Build a function for several instruction sets and let the loader choose: the wheel itself targets plain x86-64.
// TIMEROME_NO_AVX512 leaves the widest one out, so that any machine can test what others run
// (tests/ops/test_other_processors.py).
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define TIMEROME_X86
#ifdef TIMEROME_NO_AVX512
#define TIMEROME_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define TIMEROME_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define TIMEROME_AVX512
#endif
#else
#define TIMEROME_CLONES
#endif
