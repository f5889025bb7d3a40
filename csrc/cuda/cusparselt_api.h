// The cuSPARSELt functions used here, looked up in the library at run time. A CUDA build of PyTorch has the library loaded already;
// neither its header nor the library is needed to build. Numbers and sizes are those of its documented interface since 0.8.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace sparsekern::cusparselt {

enum DataType : int { kHalf = 2, kBFloat16 = 14 };                               // cudaDataType
enum Operation : int { kAsItIs = 0, kTransposed = 1 };                           // cusparseOperation_t
enum Order : int { kColumnMajor = 1, kRowMajor = 2 };                            // cusparseOrder_t
enum Sparsity : int { kHalfOfThem = 0 };                                         // cusparseLtSparsity_t
enum ComputeType : int { kFloat = 2 };                                           // cusparseComputeType
enum MatmulAttribute : int { kBiasPointer = 8 };                                 // cusparseLtMatmulDescAttribute_t
enum SelectionAttribute : int { kAlgorithm = 0, kSplitK = 3, kSplitKMode = 4 };  // cusparseLtMatmulAlgAttribute_t
constexpr uint32_t kAlignment = 16;

// Handles, descriptors, selections and plans: 512 opaque bytes. They refer to each other, so that they must not move.
struct alignas(16) Opaque {
  unsigned char data[512];
};

struct Api {
  using Status = int;
  int version;  // 801 is 0.8.1
  Status (*get_property)(int which, int* value);
  const char* (*error_string)(Status);
  Status (*init)(Opaque* handle);
  Status (*destroy)(const Opaque* handle);
  Status (*dense)(
      const Opaque* handle, Opaque* matrix, int64_t rows, int64_t columns, int64_t pitch, uint32_t alignment, int type, int order);
  Status (*structured)(
      const Opaque* handle, Opaque* matrix, int64_t rows, int64_t columns, int64_t pitch, uint32_t alignment, int type, int order,
      int sparsity);
  Status (*destroy_matrix)(const Opaque* matrix);
  Status (*matmul)(
      const Opaque* handle, Opaque* matmul, int op_a, int op_b, const Opaque* a, const Opaque* b, const Opaque* c, const Opaque* d,
      int compute_type);
  Status (*set_matmul)(const Opaque* handle, Opaque* matmul, int attribute, const void* data, size_t bytes);
  Status (*selection)(const Opaque* handle, Opaque* selection, const Opaque* matmul, int algorithm);
  Status (*set_selection)(const Opaque* handle, Opaque* selection, int attribute, const void* data, size_t bytes);
  Status (*get_selection)(const Opaque* handle, const Opaque* selection, int attribute, void* data, size_t bytes);
  Status (*destroy_selection)(const Opaque* selection);
  Status (*plan)(const Opaque* handle, Opaque* plan, const Opaque* matmul, const Opaque* selection);
  Status (*destroy_plan)(const Opaque* plan);
  Status (*workspace)(const Opaque* handle, const Opaque* plan, size_t* bytes);
  Status (*multiply)(
      const Opaque* handle, const Opaque* plan, const void* alpha, const void* a, const void* b, const void* beta, const void* c,
      void* d, void* workspace, cudaStream_t* streams, int32_t count);
  Status (*search)(
      const Opaque* handle, Opaque* plan, const void* alpha, const void* a, const void* b, const void* beta, const void* c, void* d,
      void* workspace, cudaStream_t* streams, int32_t count);

  void check(Status status, const char* what) const {
    if (status != 0) throw std::runtime_error(std::string("cuSPARSELt: ") + what + " failed: " + error_string(status));
  }
};

namespace detail {

inline Api load(const std::string& file) {
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("cuSPARSELt: ") + dlerror());
  Api api;
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) throw std::runtime_error("cuSPARSELt: " + file + " has no " + name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find(api.get_property, "cusparseLtGetProperty");
  find(api.error_string, "cusparseLtGetErrorString");
  int parts[3] = {};
  for (int i = 0; i < 3; ++i) api.check(api.get_property(i, &parts[i]), "cusparseLtGetProperty");
  api.version = 1000 * parts[0] + 100 * parts[1] + parts[2];
  if (parts[0] != 0 || parts[1] < 8) {
    throw std::runtime_error(
        "cuSPARSELt: expected version 0.8 or a later 0.x, got " + std::to_string(parts[0]) + "." + std::to_string(parts[1]) + "." +
        std::to_string(parts[2]));
  }
  find(api.init, "cusparseLtInit");
  find(api.destroy, "cusparseLtDestroy");
  find(api.dense, "cusparseLtDenseDescriptorInit");
  find(api.structured, "cusparseLtStructuredDescriptorInit");
  find(api.destroy_matrix, "cusparseLtMatDescriptorDestroy");
  find(api.matmul, "cusparseLtMatmulDescriptorInit");
  find(api.set_matmul, "cusparseLtMatmulDescSetAttribute");
  find(api.selection, "cusparseLtMatmulAlgSelectionInit");
  find(api.set_selection, "cusparseLtMatmulAlgSetAttribute");
  find(api.get_selection, "cusparseLtMatmulAlgGetAttribute");
  find(api.destroy_selection, "cusparseLtMatmulAlgSelectionDestroy");
  find(api.plan, "cusparseLtMatmulPlanInit");
  find(api.destroy_plan, "cusparseLtMatmulPlanDestroy");
  find(api.workspace, "cusparseLtMatmulGetWorkspace");
  find(api.multiply, "cusparseLtMatmul");
  find(api.search, "cusparseLtMatmulSearch");
  return api;
}

struct Opened {
  std::mutex mutex;
  const Api* api = nullptr;
};
inline Opened& opened() {
  static Opened state;
  return state;
}

}  // namespace detail

// Throws std::runtime_error with the reason if the library cannot be opened. The first library opened is used from then on.
inline const Api& open(const std::string& file) {
  const std::lock_guard<std::mutex> lock(detail::opened().mutex);
  if (detail::opened().api == nullptr) detail::opened().api = new Api(detail::load(file));
  return *detail::opened().api;
}

inline const Api& api() {
  const std::lock_guard<std::mutex> lock(detail::opened().mutex);
  if (detail::opened().api == nullptr) throw std::runtime_error("cuSPARSELt: expected cusparselt_open to be called first");
  return *detail::opened().api;
}

}  // namespace sparsekern::cusparselt
