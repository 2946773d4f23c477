// The part of cuBLASLt's C interface that the handlers use, declared by hand and found with dlopen.
//
// Neither CUDA nor cuBLAS headers are needed to build, and nothing of CUDA is linked: the library that is built here
// loads, and compiles programs ahead of time, on a machine without CUDA. Numbers are those of cublasLt.h,
// cublas_api.h and library_types.h of CUDA 12.9 and 13; with -DQJAX_CHECK_CUDA_HEADERS (and their include paths) the
// compiler compares each with its header.
#ifndef QJAX_XLA_FFI_CUBLASLT_API_H_
#define QJAX_XLA_FFI_CUBLASLT_API_H_

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>

#ifdef QJAX_CHECK_CUDA_HEADERS
#include <cublasLt.h>
#endif

namespace qjax::lt {

using Status = int;  // cublasStatus_t
constexpr Status kSuccess = 0, kNotSupported = 15;

enum DataType : int32_t {  // cudaDataType_t
  kF32 = 0, kF16 = 2, kS8 = 3, kS32 = 10, kBF16 = 14, kE4M3 = 28, kE5M2 = 29, kE2M1 = 33,
};
enum Compute : int32_t { kCompute32F = 68, kCompute32I = 72 };  // cublasComputeType_t
enum Operation : int32_t { kNormal = 0, kTransposed = 1 };      // cublasOperation_t

enum DescAttribute : int32_t {  // cublasLtMatmulDescAttributes_t
  kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8, kAScalePointer = 17, kBScalePointer = 18,
  kDScalePointer = 20, kAmaxDPointer = 21, kFastAccum = 25, kBiasType = 26, kAScaleMode = 31, kBScaleMode = 32,
};
enum PreferenceAttribute : int32_t {  // cublasLtMatmulPreferenceAttributes_t
  kMaxWorkspace = 1, kMinAlignmentA = 5, kMinAlignmentB = 6, kMinAlignmentC = 7, kMinAlignmentD = 8,
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  uint64_t algo[8];
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

#ifdef QJAX_CHECK_CUDA_HEADERS
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(Heuristic, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(kF32 == CUDA_R_32F && kF16 == CUDA_R_16F && kS8 == CUDA_R_8I && kS32 == CUDA_R_32I &&
              kBF16 == CUDA_R_16BF && kE4M3 == CUDA_R_8F_E4M3 && kE5M2 == CUDA_R_8F_E5M2 && kE2M1 == CUDA_R_4F_E2M1);
static_assert(kCompute32F == CUBLAS_COMPUTE_32F && kCompute32I == CUBLAS_COMPUTE_32I);
static_assert(kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(kTransA == CUBLASLT_MATMUL_DESC_TRANSA && kTransB == CUBLASLT_MATMUL_DESC_TRANSB &&
              kEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE && kBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER &&
              kAScalePointer == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER &&
              kBScalePointer == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER &&
              kDScalePointer == CUBLASLT_MATMUL_DESC_D_SCALE_POINTER &&
              kAmaxDPointer == CUBLASLT_MATMUL_DESC_AMAX_D_POINTER && kFastAccum == CUBLASLT_MATMUL_DESC_FAST_ACCUM &&
              kBiasType == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE && kAScaleMode == CUBLASLT_MATMUL_DESC_A_SCALE_MODE &&
              kBScaleMode == CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
static_assert(kMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES &&
              kMinAlignmentA == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              kMinAlignmentB == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES &&
              kMinAlignmentC == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES &&
              kMinAlignmentD == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
// What constants.py passes through as plain numbers.
static_assert(CUBLASLT_EPILOGUE_DEFAULT == 1 && CUBLASLT_EPILOGUE_RELU == 2 && CUBLASLT_EPILOGUE_BIAS == 4 &&
              CUBLASLT_EPILOGUE_RELU_BIAS == 6 && CUBLASLT_EPILOGUE_GELU == 32 && CUBLASLT_EPILOGUE_GELU_BIAS == 36);
static_assert(CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F == 0 && CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 == 1 &&
              CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 == 2 && CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F == 3 &&
              CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F == 4 && CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F == 5);
#endif

// Functions here are static: a static object of an inline one would be shared by every library of a process that has
// this header, two versions of QJAX or a test's stand-in among them.

// The functions of the library, or why there are none.
struct Api {
  std::string error;
  size_t (*GetVersion)() = nullptr;
  const char* (*GetStatusName)(Status) = nullptr;
  Status (*Create)(void** handle) = nullptr;
  Status (*MatmulDescCreate)(void** desc, int32_t compute, int32_t scale_type) = nullptr;
  Status (*MatmulDescDestroy)(void* desc) = nullptr;
  Status (*MatmulDescSetAttribute)(void* desc, int32_t attribute, const void* value, size_t size) = nullptr;
  Status (*MatrixLayoutCreate)(void** layout, int32_t type, uint64_t rows, uint64_t cols, int64_t ld) = nullptr;
  Status (*MatrixLayoutDestroy)(void* layout) = nullptr;
  Status (*MatmulPreferenceCreate)(void** preference) = nullptr;
  Status (*MatmulPreferenceDestroy)(void* preference) = nullptr;
  Status (*MatmulPreferenceSetAttribute)(void* preference, int32_t attribute, const void* value, size_t size) = nullptr;
  Status (*MatmulAlgoGetHeuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                   int want, Heuristic* results, int* got) = nullptr;
  Status (*Matmul)(void* handle, void* desc, const void* alpha, const void* A, void* a, const void* B, void* b,
                   const void* beta, const void* C, void* c, void* D, void* d, const void* algo, void* workspace,
                   size_t workspace_size, void* stream) = nullptr;
};

static Api FindApi() {
  Api api;
  // The copy that JAX has loaded is the one it was tested with; RTLD_NOLOAD finds that one first.
  void* library = nullptr;
  for (int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL})
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (library == nullptr) library = dlopen(name, flags);
  if (library == nullptr) {
    api.error = "neither libcublasLt.so.13 nor libcublasLt.so.12 was found";
    return api;
  }
  auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) api.error += std::string("libcublasLt has no ") + name + "; ";
  };
  load(api.GetVersion, "cublasLtGetVersion");
  load(api.GetStatusName, "cublasLtGetStatusName");
  load(api.Create, "cublasLtCreate");
  load(api.MatmulDescCreate, "cublasLtMatmulDescCreate");
  load(api.MatmulDescDestroy, "cublasLtMatmulDescDestroy");
  load(api.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
  load(api.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
  load(api.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
  load(api.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
  load(api.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
  load(api.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
  load(api.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
  load(api.Matmul, "cublasLtMatmul");
  return api;
}

static const Api& Get() {
  static const Api api = FindApi();
  return api;
}

// The process's handle for a device, made at first use. cuBLASLt handles may be used by several threads at once; they
// live as long as the process, since CUDA is gone by the time static objects are destroyed.
static Status HandleFor(int32_t device, void** handle) {
  static std::mutex mutex;
  static auto& handles = *new std::map<int32_t, void*>();
  std::lock_guard<std::mutex> lock(mutex);
  auto found = handles.find(device);
  if (found == handles.end()) {
    void* made = nullptr;
    if (Status status = Get().Create(&made)) return status;
    found = handles.emplace(device, made).first;
  }
  *handle = found->second;
  return kSuccess;
}

}  // namespace qjax::lt

#endif  // QJAX_XLA_FFI_CUBLASLT_API_H_
