// cuBLASLt on a CPU, for tests: the functions that the handlers call, from the library's documentation alone.
//
// Everything is column-major as there: D [m, n] = epilogue(A^T [m, k] B [k, n] + beta C), A stored [k, m]. Scale
// layouts are written as the chapter "Narrow Precision Data Types Usage" has them, so that a handler that lays scales
// out otherwise gives a wrong answer here too. Combinations that an H200 refused are refused.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

extern "C" {

enum { kOk = 0, kInvalid = 7, kUnsupported = 15 };
enum { F32 = 0, F16 = 2, S8 = 3, S32 = 10, BF16 = 14, E4M3 = 28, E5M2 = 29, E2M1 = 33 };
enum { SCALAR, VEC16_UE4M3, VEC32_UE8M0, OUTER_VEC, VEC128, BLK128 };

struct Attributes {
  std::map<int, uint64_t> values;
  void Set(int key, const void* value, size_t size) { std::memcpy(&(values[key] = 0), value, size); }
  uint64_t Get(int key, uint64_t otherwise) const {
    auto found = values.find(key);
    return found == values.end() ? otherwise : found->second;
  }
};
struct Layout {
  int type;
  int64_t rows, cols, ld;
};
struct Heuristic {
  uint64_t algo[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

static int g_heuristics = 0, g_matmuls = 0, g_candidate = -1;
int FakeHeuristics() { return g_heuristics; }
int FakeMatmuls() { return g_matmuls; }
int FakeCandidate() { return g_candidate; }

// A float of `e` exponent and `m` mantissa bits.
static double Small(unsigned code, int e, int m, int bias) {
  int exponent = (code >> m) & ((1 << e) - 1), fraction = code & ((1 << m) - 1);
  double value = exponent ? std::ldexp(1 + std::ldexp(fraction, -m), exponent - bias)
                          : std::ldexp(std::ldexp(fraction, -m), 1 - bias);
  return (code >> (e + m)) & 1 ? -value : value;
}

static double Load(const void* data, int type, int64_t at) {
  auto* bytes = static_cast<const uint8_t*>(data);
  switch (type) {
    case F32: return static_cast<const float*>(data)[at];
    case S32: return static_cast<const int32_t*>(data)[at];
    case S8: return static_cast<const int8_t*>(data)[at];
    case E4M3: return Small(bytes[at], 4, 3, 7);
    case E5M2: return Small(bytes[at], 5, 2, 15);
    case E2M1: return Small(at % 2 ? bytes[at / 2] >> 4 : bytes[at / 2] & 15, 2, 1, 1);
    case F16: return Small(static_cast<const uint16_t*>(data)[at], 5, 10, 15);
    default: {
      uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[at]} << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
  }
}

// The code among `count` whose value is nearest, ties to even.
static unsigned Nearest(double value, unsigned count, int e, int m, int bias) {
  unsigned low = 0, high = count - 1;
  double size = std::min(std::fabs(value), Small(high, e, m, bias));
  while (high - low > 1) {
    unsigned middle = (low + high) / 2;
    (Small(middle, e, m, bias) <= size ? low : high) = middle;
  }
  double under = size - Small(low, e, m, bias), over = Small(high, e, m, bias) - size;
  unsigned code = under < over || (under == over && low % 2 == 0) ? low : high;
  return code | (std::signbit(value) ? 1u << (e + m) : 0);
}

static void Store(void* data, int type, int64_t at, double value) {
  switch (type) {
    case F32: static_cast<float*>(data)[at] = static_cast<float>(value); break;
    case S32: static_cast<int32_t*>(data)[at] = static_cast<int32_t>(value); break;
    case F16: static_cast<uint16_t*>(data)[at] = Nearest(value, 0x7c00, 5, 10, 15); break;
    case E4M3: static_cast<uint8_t*>(data)[at] = Nearest(value, 0x7f, 4, 3, 7); break;
    default: static_cast<uint16_t*>(data)[at] = Nearest(value, 0x7f80, 8, 7, 127);
  }
}

// The factor of element (outer, k) of an operand with `outers` rows or columns.
static double Scale(int mode, uint64_t pointer, int64_t outer, int64_t outers, int64_t k, int64_t depth) {
  auto* floats = reinterpret_cast<const float*>(pointer);
  auto* bytes = reinterpret_cast<const uint8_t*>(pointer);
  int64_t blocks = (depth + 127) / 128, unit = mode == VEC16_UE4M3 ? 16 : 32;
  int64_t inner = k / unit, inners = (depth / unit + 3) / 4 * 4;
  int64_t tile = (inner / 4 * 4 + outer / 128 * inners) * 128;
  int64_t at = tile + (outer % 32) * 16 + (outer % 128) / 32 * 4 + inner % 4;
  switch (mode) {
    case SCALAR: return pointer ? floats[0] : 1;
    case OUTER_VEC: return floats[outer];
    case VEC128: return floats[k / 128 * outers + outer];
    case BLK128: return floats[outer / 128 * ((blocks + 3) / 4 * 4) + k / 128];
    case VEC16_UE4M3: return Small(bytes[at] & 127, 4, 3, 7);
    default: return std::ldexp(1.0, bytes[at] - 127);
  }
}

size_t cublasLtGetVersion() { return 130200; }
const char* cublasLtGetStatusName(int status) {
  return status == kInvalid ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
int cublasLtCreate(void** handle) { return *handle = new int, kOk; }
int cublasLtMatmulDescCreate(void** desc, int, int) { return *desc = new Attributes, kOk; }
int cublasLtMatmulDescDestroy(Attributes* desc) { return delete desc, kOk; }
int cublasLtMatmulDescSetAttribute(Attributes* desc, int key, const void* value, size_t size) {
  return desc->Set(key, value, size), kOk;
}
int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  return *layout = new Layout{type, int64_t(rows), int64_t(cols), ld}, kOk;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, kOk; }
int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new Attributes, kOk; }
int cublasLtMatmulPreferenceDestroy(Attributes* preference) { return delete preference, kOk; }
int cublasLtMatmulPreferenceSetAttribute(Attributes* preference, int key, const void* value, size_t size) {
  return preference->Set(key, value, size), kOk;
}

int cublasLtMatmulAlgoGetHeuristic(void*, Attributes* desc, Layout* a, Layout*, Layout*, Layout* d, Attributes* limits,
                                   int want, Heuristic* results, int* got) {
  ++g_heuristics;
  int a_mode = desc->Get(31, 0), b_mode = desc->Get(32, 0);
  bool blocks = a_mode >= VEC128 || b_mode >= VEC128, micro = a_mode == VEC16_UE4M3 || a_mode == VEC32_UE8M0;
  *got = 0;
  if (desc->Get(3, 0) != 1 || desc->Get(4, 0) != 0) return kUnsupported;  // only A transposed
  if ((a_mode == SCALAR || a_mode == OUTER_VEC || micro) && a_mode != b_mode) return kInvalid;
  if (blocks && (a_mode == OUTER_VEC || b_mode == OUTER_VEC)) return kUnsupported;
  if (a_mode == BLK128 && b_mode == BLK128) return kUnsupported;
  if (blocks && (desc->Get(25, 0) || d->rows % 4 || d->cols % 4)) return kUnsupported;  // fast accumulation; M, N
  if (a->type == S8 && d->type != S32) return kUnsupported;
  if ((a_mode || a->type == E4M3 || a->type == E5M2) && (!desc->Get(17, 0) || !desc->Get(18, 0))) return kInvalid;
  if (limits->Get(1, 0) < 1024) return kUnsupported;
  int answers = 3;
  for (; *got < std::min(want, answers); ++*got) results[*got] = Heuristic{{uint64_t(*got)}, 0, kOk, 1, {}};
  return kOk;
}

int cublasLtMatmul(void*, Attributes* desc, const void* alpha, const void* A, Layout* a, const void* B, Layout* b,
                   const void* beta, const void* C, Layout* c, void* D, Layout* d, const uint64_t* algo, void*, size_t,
                   void*) {
  for (int key : {17, 18, 20, 21})  // an H200 refuses scales that do not start at a multiple of 16 bytes
    if (desc->Get(key, 0) % 16) return kUnsupported;
  ++g_matmuls;
  g_candidate = int(algo[0]);
  bool integer = a->type == S8;
  double times = Load(alpha, integer ? S32 : F32, 0), plus = Load(beta, integer ? S32 : F32, 0);
  int epilogue = desc->Get(7, 1);
  auto* bias = reinterpret_cast<const void*>(desc->Get(8, 0));
  auto* amax = reinterpret_cast<float*>(desc->Get(21, 0));
  double out_scale = desc->Get(20, 0) ? *reinterpret_cast<float*>(desc->Get(20, 0)) : 1, largest = 0;
  for (int64_t j = 0; j < d->cols; ++j)
    for (int64_t i = 0; i < d->rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < a->rows; ++k)
        sum += Load(A, a->type, i * a->ld + k) * Scale(desc->Get(31, 0), desc->Get(17, 0), i, d->rows, k, a->rows) *
               Load(B, b->type, j * b->ld + k) * Scale(desc->Get(32, 0), desc->Get(18, 0), j, d->cols, k, a->rows);
      sum *= times;
      if (plus) sum += plus * Load(C, c->type, j * c->ld + i);
      if (epilogue & 4) sum += Load(bias, int(desc->Get(26, d->type)), i);
      if (epilogue & 2) sum = std::max(sum, 0.0);
      if (epilogue & 32) sum = 0.5 * sum * (1 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
      largest = std::max(largest, std::fabs(sum));
      Store(D, d->type, j * d->ld + i, sum * out_scale);
    }
  if (amax) *amax = float(largest);
  return kOk;
}
}
