#pragma once
/// @file
/// One function, compiled per instruction set and chosen when the program is loaded.

/// Since products are never fused with sums here, all clones give the same bits. Not under TSan:
/// the loader calls the chooser before TSan is there, and it crashes.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define ORTHRUS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ORTHRUS_CLONES
#endif
