// Products of every form without XLA, for a build with sanitizers: operands end where their memory does, tasks run on
// threads of their own, and every instruction set has to agree with the portable one.
#include "handlers.cc"

#include <cmath>
#include <cstdio>
#include <random>
#include <thread>

namespace qjax::cpu {
namespace {

std::vector<std::thread>& Threads() {
  static std::vector<std::thread> threads;
  return threads;
}

XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  Threads().emplace_back(args->task, args->data);
  return nullptr;
}

XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 3;
  return nullptr;
}

// An array that owns exactly its bytes.
struct Owned {
  Owned(ffi::DataType type, size_t item, std::vector<int64_t> shape) : dims(std::move(shape)) {
    size = item;
    for (int64_t d : dims) size *= d;
    if (posix_memalign(&data, 64, size) != 0) std::abort();
    buffer = {sizeof buffer, nullptr, static_cast<XLA_FFI_DataType>(type), data, int64_t(dims.size()), dims.data()};
  }
  Owned(const Owned&) = delete;
  ~Owned() { std::free(data); }

  void FillWithBytes(std::mt19937& random) {
    for (size_t i = 0; i < size; ++i) static_cast<uint8_t*>(data)[i] = random() % 112;  // no NaN in FP8
  }
  void FillWithHalves(std::mt19937& random) {  // bfloat16
    for (size_t i = 0; i < size / 2; ++i) {
      const float value = (random() % 1000) / 500.0f - 1;
      std::memcpy(static_cast<uint8_t*>(data) + 2 * i, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
    }
  }
  void FillWithFloats(std::mt19937& random) {
    for (size_t i = 0; i < size / 4; ++i) static_cast<float*>(data)[i] = (random() % 1000) / 500.0f - 1;
  }

  std::vector<int64_t> dims;
  size_t size;
  void* data = nullptr;
  XLA_FFI_Buffer buffer;
};

struct Case {
  ffi::DataType codes;
  int bits;
  int64_t m, k, n, group;
  bool zero, int8_x, transposed, half_x;
};

// Whether all sets of instructions agree on a product; false with a word on what does not.
bool Agrees(const Case& c, ffi::ThreadPool& pool) {
  std::mt19937 random(1);
  const int64_t groups = (c.k + c.group - 1) / c.group;
  const int64_t whole = c.bits == 8 ? c.k : (c.k + 127) / 128 * 128;  // k as it is stored
  const ffi::DataType x_type = c.int8_x ? ffi::S8 : c.half_x ? ffi::BF16 : ffi::F32;
  Owned x(x_type, c.int8_x ? 1 : c.half_x ? 2 : 4, {c.m, c.transposed ? c.n : c.k});
  Owned packed = c.bits == 8 ? Owned(c.codes, 1, {c.n, c.k}) : Owned(c.codes, 4, {c.n, whole / 128, 4 * c.bits});
  Owned y(ffi::F32, 4, {c.m, c.transposed ? whole : c.n});
  Owned scale(ffi::F32, 4, {c.n, groups}), zero(ffi::S8, 1, {c.n, groups});
  c.int8_x ? x.FillWithBytes(random) : c.half_x ? x.FillWithHalves(random) : x.FillWithFloats(random);
  packed.FillWithBytes(random), scale.FillWithFloats(random), zero.FillWithBytes(random);
  Operands o{ffi::AnyBuffer(&x.buffer), ffi::AnyBuffer(&packed.buffer), ffi::AnyBuffer(&scale.buffer),
             ffi::AnyBuffer(&y.buffer), {}};
  if (c.zero) o.role[kZeroPoint] = ffi::AnyBuffer(&zero.buffer);
  Product p{};
  const float table[256] = {};
  const int entries = c.codes == ffi::U8 ? 256 : 0;
  const ffi::Span<const float> values(table, entries);
  if (ffi::Error error = Describe(o, values, c.group, 1, c.transposed, p); error.failure()) {
    std::printf("%s\n", error.message().c_str());
    return false;
  }
  std::vector<float> first;
  auto run = [&](const Instructions& set) {
    if (!set.available()) return true;
    Run(p, set, pool);
    std::vector<float> got(p.y, p.y + p.m * p.width());
    for (std::thread& thread : Threads()) thread.join();
    Threads().clear();
    if (first.empty()) first = got;
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < got.size(); ++i) error += std::pow(got[i] - first[i], 2), size += std::pow(first[i], 2);
    if (error <= 1e-10 * size) return true;
    std::printf("%s: %g of %g\n", set.name, error, size);
    return false;
  };
  bool agree = true;
  if (c.int8_x)
    for (const Instructions& set : kForInt8) agree = run(set) && agree;
  else
    for (const Instructions& set : kForFloats) agree = run(set) && agree;
  return agree;
}

// Whether memory that begins within an element is refused, by its shape.
bool RefusesHalfElements() {
  for (int shifted = 0; shifted < 5; ++shifted) {
    Owned x(ffi::F32, 4, {1, 130}), packed(ffi::U32, 4, {5, 2, 16}), scale(ffi::F16, 2, {5, 3});
    Owned zero(ffi::F32, 4, {5, 3}), y(ffi::F32, 4, {1, 5});
    Owned* all[] = {&x, &packed, &scale, &zero, &y};
    const char* texts[] = {"F32[1,130]", "U32[5,2,16]", "F16[5,3]", "F32[5,3]", "F32[1,5]"};
    all[shifted]->buffer.data = static_cast<char*>(all[shifted]->data) + 1;
    Operands o{ffi::AnyBuffer(&x.buffer), ffi::AnyBuffer(&packed.buffer), ffi::AnyBuffer(&scale.buffer),
               ffi::AnyBuffer(&y.buffer), {}};
    o.role[kZeroPoint] = ffi::AnyBuffer(&zero.buffer);
    Product p{};
    const ffi::Error error = Describe(o, {}, 48, 1, false, p);
    const std::string wanted = std::string("qjax_cpu_matmul: ") + texts[shifted] + " does not begin at a whole element";
    if (error.success() || error.message().compare(0, wanted.size(), wanted) != 0) {
      std::printf("%s shifted by a byte: '%s'\n", texts[shifted], error.message().c_str());
      return false;
    }
  }
  return true;
}

// Whether all sets of instructions repack nibbles alike.
bool PacksAlike(int64_t columns, int64_t of_a_column, bool turned) {
  std::mt19937 random(1);
  const int64_t rows = 37, blocks = 2;
  Owned words(ffi::U32, 4, {rows, columns}), nibbles(ffi::S32, 4, {of_a_column, blocks * kBlock});
  words.FillWithBytes(random);
  for (size_t i = 0; i < nibbles.size / 4; ++i) static_cast<int32_t*>(nibbles.data)[i] = random() % (8 * rows);
  std::vector<uint32_t> first;
  for (const Instructions& set : kForFloats) {
    if (!set.available()) continue;
    Owned out(ffi::U32, 4, {columns * of_a_column, blocks, 16});
    auto* packed = static_cast<uint32_t*>(out.data);
    const NibbleWords given{static_cast<uint32_t*>(words.data), rows, columns, turned ? 1 : columns, turned ? rows : 1,
                            static_cast<int32_t*>(nibbles.data), of_a_column, blocks, packed, blocks * 16};
    QjaxCpuPackNibbles(&given, set.name, 3);
    const std::vector<uint32_t> got(packed, packed + out.size / 4);
    if (first.empty()) first = got;
    if (got != first) return false;
  }
  return true;
}

}  // namespace

int Main() {
  XLA_FFI_Api api{};
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
  ffi::DiagnosticEngine diagnostic;
  ffi::ThreadPool pool = *ffi::CtxDecoding<ffi::ThreadPool>::Decode(&api, nullptr, diagnostic);
  struct Kind {
    ffi::DataType type;
    int bits;
  };
  const Kind kinds[] = {{ffi::U32, 2}, {ffi::U32, 3}, {ffi::U32, 4}, {ffi::U32, 5}, {ffi::U32, 6},
                        {ffi::S8, 8}, {ffi::F8E4M3FN, 8}, {ffi::F8E5M2, 8}, {ffi::U8, 8}};
  if (!RefusesHalfElements()) return 1;
  int done = 0;
  for (const Kind& kind : kinds)
    for (int64_t m : {1, 2, 7, 129})
      for (int64_t group : {392, 128, 32, 16})
        for (int flags = 0; flags < 16; ++flags) {
          const bool zero = flags & 1, int8_x = flags & 2, transposed = flags & 4, half_x = flags & 8;
          if (half_x && (m != 129 || int8_x || transposed)) continue;  // the kernels of its own
          const bool is_int = kind.type == ffi::U32 || kind.type == ffi::S8;
          if ((zero && !is_int) || (int8_x && (!is_int || (kind.bits != 4 && kind.bits != 8)))) continue;
          if (int8_x && transposed) continue;
          if (int8_x && group < (kind.bits == 4 ? 32 : 128)) continue;
          const int64_t n = m == 129 || transposed ? 54 : 684;
          const Case c{kind.type, kind.bits, m, 392, n, group, zero, int8_x, transposed, half_x};
          if (!Agrees(c, pool)) {
            std::printf("bits %d m %d group %d zero %d int8 x %d transposed %d bfloat16 x %d\n", c.bits, int(m),
                        int(group), zero, int8_x, transposed, half_x);
            return 1;
          }
          ++done;
        }
  for (int64_t columns : {1, 32, 71})
    for (int64_t of_a_column : {1, 8})
      for (bool turned : {false, true})
        if (!PacksAlike(columns, of_a_column, turned)) {
          std::printf("nibbles of %d columns, %d rows each, turned %d\n", int(columns), int(of_a_column), turned);
          return 1;
        }
  std::printf("%d products\n", done);
  return 0;
}

}  // namespace qjax::cpu

int main() { return qjax::cpu::Main(); }
