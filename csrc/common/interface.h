// The marker by which Python tells, before it loads a library, whether the ops in it take the arguments of the present schemas.
//
// Loading a library registers its kernels, which unpack their arguments without looking at the schema. A library that was built
// from other sources must therefore be refused before it is loaded. Raise the number here and in sparsekern/backends/libraries.py
// when an op is renamed or removed, or when its arguments or results change.
#pragma once

#define SPARSEKERN_INTERFACE __attribute__((used)) static const char sparsekern_interface[] = "sparsekern-interface:2";
