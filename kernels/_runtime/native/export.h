// Exported functions carry the instruction set they were compiled for: FASTSEL_EXPORT(f)(...) defines void f_avx2(...).
// Everything else in a source has internal linkage: the linker would otherwise keep one copy of an inline function for
// all instruction sets, and could keep the one that this processor cannot run.
#pragma once

#ifndef FASTSEL_ISA
#define FASTSEL_ISA plain
#endif
#define FASTSEL_JOIN_EXPANDED(name, isa) name##_##isa
#define FASTSEL_JOIN(name, isa) FASTSEL_JOIN_EXPANDED(name, isa)
#define FASTSEL_EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) void FASTSEL_JOIN(name, FASTSEL_ISA)
