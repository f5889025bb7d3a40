// A stand-in for libcusparseLt in tests on a CPU. It counts calls, enforces the order and lifetimes that the real library requires,
// and multiplies plainly. Its compressed weight is the dense one.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "common/dtype.h"

namespace {

using sparsekern::BFloat16;
using sparsekern::Half;

constexpr int kOk = 0, kInvalid = 3, kHalf = 2, kBFloat16 = 14, kColumnMajor = 1, kRowMajor = 2, kSearched = 5;

// Number of calls of each kind, by any thread.
struct Calls {
  std::mutex mutex;
  std::map<std::string, int> counts;

  void add(const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    counts[what] += 1;
  }
} calls;

// The content of an opaque object: its own address, because a copy is not a valid object, and a kind that is cleared when it is
// destroyed.
struct Object {
  char kind[16];
  const void* self;
  int64_t rows, columns, pitch;
  int type, order;
  const Object *a, *b, *d;  // operands of a matmul
  const void* bias;
  const Object* matmul;  // matmul of a selection or plan
  int algorithm, split_k, split_k_mode;
  const Object* selection;
};
static_assert(sizeof(Object) <= 512, "an opaque object is 512 bytes");

bool is(const Object* object, const char* kind) {
  return object != nullptr && object->self == object && std::strcmp(object->kind, kind) == 0;
}

Object* make(Object* object, const char* kind) {
  std::memset(object, 0, 512);
  std::strcpy(object->kind, kind);
  object->self = object;
  calls.add(kind);
  return object;
}

int destroy(const Object* object, const char* kind) {
  if (!is(object, kind)) return kInvalid;
  const_cast<Object*>(object)->self = nullptr;
  calls.add(std::string("destroyed ") + kind);
  return kOk;
}

float element(const Object& matrix, const void* data, int64_t row, int64_t column) {
  const int64_t at = matrix.order == kRowMajor ? row * matrix.pitch + column : column * matrix.pitch + row;
  const auto bits = static_cast<const uint16_t*>(data)[at];
  return matrix.type == kHalf ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

void store(const Object& matrix, void* data, int64_t row, int64_t column, float value) {
  const int64_t at = matrix.order == kRowMajor ? row * matrix.pitch + column : column * matrix.pitch + row;
  static_cast<uint16_t*>(data)[at] =
      matrix.type == kHalf ? sparsekern::from_float<Half>(value).bits : sparsekern::from_float<BFloat16>(value).bits;
}

bool whole(const Object* plan) {
  return is(plan, "plan") && is(plan->matmul, "matmul") && is(plan->selection, "selection") && is(plan->matmul->a, "matrix") &&
         is(plan->matmul->b, "matrix") && is(plan->matmul->d, "matrix");
}

int64_t workspace_of(const Object* plan) { return 64 + plan->selection->algorithm; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int fake_calls(const char* what) {
  const std::lock_guard<std::mutex> lock(calls.mutex);
  return calls.counts[what];
}

EXPORTED int cusparseLtGetProperty(int which, int* value) {
  const char* minor = std::getenv("FAKE_CUSPARSELT_MINOR");
  *value = which == 1 ? (minor == nullptr ? 8 : std::atoi(minor)) : which == 2 ? 1 : 0;
  return kOk;
}
EXPORTED const char* cusparseLtGetErrorString(int status) { return status == kOk ? "no error" : "invalid value"; }
EXPORTED int cusparseLtInit(Object* handle) { return make(handle, "handle"), kOk; }
EXPORTED int cusparseLtDestroy(const Object* handle) { return destroy(handle, "handle"); }

EXPORTED int cusparseLtDenseDescriptorInit(
    const Object* handle, Object* matrix, int64_t rows, int64_t columns, int64_t pitch, uint32_t alignment, int type, int order) {
  const bool known = (type == kHalf || type == kBFloat16) && (order == kColumnMajor || order == kRowMajor) && alignment == 16;
  if (!is(handle, "handle") || !known || rows <= 0 || rows % 8 || columns % 8 || pitch < (order == kRowMajor ? columns : rows)) {
    return kInvalid;
  }
  make(matrix, "matrix");
  matrix->rows = rows, matrix->columns = columns, matrix->pitch = pitch, matrix->type = type, matrix->order = order;
  return kOk;
}
EXPORTED int cusparseLtStructuredDescriptorInit(
    const Object* handle, Object* matrix, int64_t rows, int64_t columns, int64_t pitch, uint32_t alignment, int type, int order,
    int sparsity) {
  if (sparsity != 0 || rows % 16 || columns % 16) return kInvalid;
  return cusparseLtDenseDescriptorInit(handle, matrix, rows, columns, pitch, alignment, type, order);
}
EXPORTED int cusparseLtMatDescriptorDestroy(const Object* matrix) { return destroy(matrix, "matrix"); }

EXPORTED int cusparseLtMatmulDescriptorInit(
    const Object* handle, Object* matmul, int op_a, int op_b, const Object* a, const Object* b, const Object* c, const Object* d,
    int compute) {
  if (!is(handle, "handle") || op_a != 0 || op_b != 1 || c != d || compute != 2) return kInvalid;
  if (!is(a, "matrix") || !is(b, "matrix") || !is(d, "matrix")) return kInvalid;
  if (a->columns != b->columns || d->rows != a->rows || d->columns != b->rows || a->type != b->type || a->type != d->type)
    return kInvalid;
  make(matmul, "matmul");
  matmul->a = a, matmul->b = b, matmul->d = d;
  return kOk;
}
EXPORTED int cusparseLtMatmulDescSetAttribute(const Object* handle, Object* matmul, int attribute, const void* data, size_t bytes) {
  if (!is(handle, "handle") || !is(matmul, "matmul") || attribute != 8 || bytes != sizeof(void*)) return kInvalid;
  std::memcpy(&matmul->bias, data, bytes);
  return kOk;
}

EXPORTED int cusparseLtMatmulAlgSelectionInit(const Object* handle, Object* selection, const Object* matmul, int algorithm) {
  if (!is(handle, "handle") || !is(matmul, "matmul") || algorithm != 0) return kInvalid;
  make(selection, "selection");
  selection->matmul = matmul, selection->split_k = 1;
  return kOk;
}
EXPORTED int cusparseLtMatmulAlgSetAttribute(
    const Object* handle, Object* selection, int attribute, const void* data, size_t bytes) {
  if (!is(handle, "handle") || !is(selection, "selection") || bytes != sizeof(int)) return kInvalid;
  int value;
  std::memcpy(&value, data, sizeof value);
  if (attribute == 0) return selection->algorithm = value, kOk;
  if (attribute == 3) return selection->split_k = value, kOk;
  if (attribute == 4) return selection->split_k_mode = value, kOk;
  return kInvalid;
}
EXPORTED int cusparseLtMatmulAlgGetAttribute(
    const Object* handle, const Object* selection, int attribute, void* data, size_t bytes) {
  if (!is(handle, "handle") || !is(selection, "selection") || bytes != sizeof(int)) return kInvalid;
  const int value = attribute == 0 ? selection->algorithm : attribute == 3 ? selection->split_k : selection->split_k_mode;
  std::memcpy(data, &value, sizeof value);
  return kOk;
}
EXPORTED int cusparseLtMatmulAlgSelectionDestroy(const Object* selection) { return destroy(selection, "selection"); }

EXPORTED int cusparseLtMatmulPlanInit(const Object* handle, Object* plan, const Object* matmul, const Object* selection) {
  if (!is(handle, "handle") || !is(matmul, "matmul") || !is(selection, "selection")) return kInvalid;
  make(plan, "plan");
  plan->matmul = matmul, plan->selection = selection, plan->bias = matmul->bias;  // as if the plan copied the address of the bias
  return kOk;
}
EXPORTED int cusparseLtMatmulPlanDestroy(const Object* plan) { return destroy(plan, "plan"); }
EXPORTED int cusparseLtMatmulGetWorkspace(const Object* handle, const Object* plan, size_t* bytes) {
  if (!is(handle, "handle") || !whole(plan)) return kInvalid;
  *bytes = static_cast<size_t>(workspace_of(plan));
  return kOk;
}

EXPORTED int cusparseLtMatmul(
    const Object* handle, const Object* plan, const void* alpha, const void* a, const void* b, const void* beta, const void* c,
    void* d, void* workspace, void** streams, int count) {
  if (!is(handle, "handle") || !whole(plan) || c != d || count != 1 || streams == nullptr) return kInvalid;
  if (*static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f) return kInvalid;
  std::memset(workspace, 0xff, static_cast<size_t>(workspace_of(plan)));
  const Object &weight = *plan->matmul->a, &x = *plan->matmul->b, &product = *plan->matmul->d;
  for (int64_t token = 0; token < x.rows; ++token) {
    for (int64_t out = 0; out < weight.rows; ++out) {
      float sum = 0.0f;
      for (int64_t in = 0; in < x.columns; ++in) sum += element(weight, a, out, in) * element(x, b, token, in);
      if (plan->bias != nullptr) {
        const Object vector{"", nullptr, 1, weight.rows, weight.rows, weight.type, kRowMajor, {}, {}, {}, {}, {}, 0, 0, 0, {}};
        sum += element(vector, plan->bias, 0, out);
      }
      store(product, d, out, token, sum);
    }
  }
  calls.add("multiply");
  calls.add("multiply by algorithm " + std::to_string(plan->selection->algorithm));
  return kOk;
}

// Finds algorithm 5, and overwrites the operands.
EXPORTED int cusparseLtMatmulSearch(
    const Object* handle, Object* plan, const void* alpha, const void* a, const void* b, const void* beta, const void* c, void* d,
    void* workspace, void** streams, int count) {
  const int status = cusparseLtMatmul(handle, plan, alpha, a, b, beta, c, d, workspace, streams, count);
  if (status != kOk) return status;
  const Object& weight = *plan->matmul->a;
  std::memset(const_cast<void*>(a), 0, static_cast<size_t>(weight.rows * weight.columns) * 2);
  const_cast<Object*>(plan->selection)->algorithm = kSearched;
  calls.add("search");
  return kOk;
}
