// A planted fault, in the sanitized build only, with which a test shows that the check can fail.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int sparsekern_read_past(const uint8_t* data, int64_t size) { return data[size]; }

extern "C" __attribute__((visibility("default"))) int sparsekern_overflow(int value) { return value + 1; }
