// Number by which Python checks, before it loads a library, that the ops in it match the current schemas.
//
// Loading a library registers its kernels, which unpack their arguments without looking at the schema. A library built from other
// sources must therefore be refused before it is loaded. Raise the number here and in sparsekern/backends/libraries.py when an op
// is renamed or removed, or when its arguments or results change.
#pragma once

#define SPARSEKERN_INTERFACE __attribute__((used)) static const char sparsekern_interface[] = "sparsekern-interface:2";
