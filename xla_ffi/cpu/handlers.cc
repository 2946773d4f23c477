// XLA FFI handlers of two custom calls on the host. `qjax_cpu_quantize_rows` is quantize_rows.h; `qjax_cpu_matmul`:
//
//     y[b] = x[b] @ w[b]^T,  or  x[b] @ w[b] where `transposed` is set
//     w[n, k] = (value(code[n, k]) - zero[n', k']) * scale[n', k']        b over the leading axes
//     n' = n / block_n, k' = k / group
//
// Operands, row-major, in this order; those after scale only where their bit of the attribute `operands` is set:
//     x           [.., M, K] ([.., M, N] if transposed) float, or int8 whose scales the caller applies
//     packed      [.., N, ceil(K / 128), 4 * bits] uint32, or [.., N, K] of a byte each
//     scale       [.., ceil(N / block_n), ceil(K / group)]
//     zero_point  like scale
//     codebook    [.., 16 or 256] float32
// Result: y [.., M, N] float32; [.., M, K] if transposed, packed K with its padding.
// Attributes: `table`, the codes' values where the format has its own table, else empty; `instructions`, a name of those
// in instructions.h, or empty for the best that this machine has.
#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "instructions.h"
#include "parallel.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qjax::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 256;              // of x: what is prepared, and kept beside a panel of the weight
constexpr int64_t kWorkOfATask = 1 << 18;         // multiplications, below which another thread is not worth waking
constexpr int64_t kTasksOfAThread = 4;            // for the last of which the others wait
constexpr int64_t kTasksOfAThreadForOneRow = 16;  // or for two, with which a task has less to prepare
constexpr int64_t kColumnTasksOfAThread = 2;      // each of which reads all scales

constexpr std::array<float, 16> kInt4Values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

enum Role { kZeroPoint, kCodebook, kRoles };

struct Operands {
  ffi::AnyBuffer x, packed, scale, y;
  std::array<std::optional<ffi::AnyBuffer>, kRoles> role;
};

// "f32[4,2048,4096]", for error messages.
std::string Text(ffi::AnyBuffer buffer) {
  std::ostringstream out;
  out << static_cast<XLA_FFI_DataType>(buffer.element_type()) << "[";
  const char* separator = "";
  for (int64_t size : buffer.dimensions()) out << std::exchange(separator, ",") << size;
  out << "]";
  return out.str();
}

ffi::Error Wrong(const char* what, const Operands& o) {
  std::ostringstream out;
  out << "qjax_cpu_matmul: " << what << "; y " << Text(o.y) << " = x " << Text(o.x) << " @ packed " << Text(o.packed)
      << ", scale " << Text(o.scale);
  if (o.role[kZeroPoint]) out << ", zero_point " << Text(*o.role[kZeroPoint]);
  if (o.role[kCodebook]) out << ", codebook " << Text(*o.role[kCodebook]);
  return ffi::Error::InvalidArgument(out.str());
}

std::optional<Number> NumberOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Number::kF32;
    case ffi::BF16: return Number::kBF16;
    case ffi::F16: return Number::kF16;
    case ffi::F8E8M0FNU: return Number::kE8M0;
    case ffi::F8E4M3FN: return Number::kE4M3;
    case ffi::S8: return Number::kInt8;
    default: return std::nullopt;
  }
}

std::optional<Codes> CodesOf(ffi::AnyBuffer packed, bool has_table) {
  switch (packed.element_type()) {
    case ffi::S8: return Codes::kInt8;
    case ffi::F8E4M3FN: return Codes::kE4M3;
    case ffi::F8E5M2: return Codes::kE5M2;
    case ffi::U8: return has_table ? std::optional(Codes::kTable256) : std::nullopt;
    case ffi::U32: break;
    default: return std::nullopt;
  }
  switch (packed.dimensions().back()) {
    case 8: return Codes::kInt2;
    case 12: return Codes::kInt3;
    case 16: return has_table ? Codes::kTable16 : Codes::kInt4;
    case 20: return Codes::kInt5;
    case 24: return Codes::kInt6;
    default: return std::nullopt;
  }
}

// Whether a buffer begins where one of its elements may.
bool IsAligned(ffi::AnyBuffer buffer) {
  const size_t width = std::max<size_t>(1, ffi::ByteWidth(buffer.element_type()));
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % width == 0;
}

// Leading axes of a buffer whose own are the last `own`.
int64_t Batch(ffi::AnyBuffer buffer, size_t own) {
  const auto dims = buffer.dimensions();
  return std::accumulate(dims.begin(), dims.end() - own, int64_t{1}, std::multiplies<>());
}

// How scales lie in the kernels' order, and which group's is where.
bool PlaceScales(Product& p) {
  const bool packed = IsPacked(p.codes_type);
  if (p.groups == 1 || p.group % kBlock == 0) {
    p.scales = Scales::kOne, p.slots = 1;
  } else if (packed && p.group % 32 == 0) {
    p.scales = Scales::kLanes, p.slots = 4;
  } else if (p.group % 16 == 0) {
    p.scales = Scales::kSixteens, p.slots = 8;
  } else {
    return false;
  }
  const int64_t slots = p.blocks * p.slots;
  p.slot_group.assign((slots + 15) / 16 * 16, 0);
  p.slots_are_groups = slots == p.groups;
  for (int64_t i = 0; i < slots; ++i) {
    p.slot_group[i] = int32_t(std::min(i * (kBlock / p.slots) / p.group, p.groups - 1));
    p.slots_are_groups = p.slots_are_groups && p.slot_group[i] == i;
  }
  return true;
}

// The product of the first element of the batch; `Advance` makes it the next one's.
ffi::Error Describe(const Operands& o, ffi::Span<const float> table, int64_t group, int64_t block_n, bool transposed,
                    Product& p) {
  const auto x = o.x.dimensions(), packed = o.packed.dimensions(), scale = o.scale.dimensions(), y = o.y.dimensions();
  if (x.size() < 2 || scale.size() < 2 || y.size() < 2 || packed.size() < 2)
    return Wrong("operands have two axes and more", o);
  for (const ffi::AnyBuffer& buffer : {o.x, o.packed, o.scale, o.role[kZeroPoint].value_or(o.y),
                                       o.role[kCodebook].value_or(o.y), o.y})
    if (!IsAligned(buffer)) return Wrong((Text(buffer) + " does not begin at a whole element").c_str(), o);
  const bool has_table = o.role[kCodebook] || table.size() > 0;
  const auto codes = CodesOf(o.packed, has_table);
  const auto x_type = NumberOf(o.x.element_type()), scale_type = NumberOf(o.scale.element_type());
  if (!codes || !x_type || *x_type == Number::kE8M0 || *x_type == Number::kE4M3 || !scale_type ||
      *scale_type == Number::kInt8)
    return Wrong("a dtype that it does not read", o);
  if (*x_type == Number::kInt8 && ((*codes != Codes::kInt4 && *codes != Codes::kInt8) || transposed))
    return Wrong("x as int8 meets codes of int4 and int8", o);
  p.codes_type = *codes;
  const bool is_packed = IsPacked(*codes);
  const size_t own = is_packed ? 3 : 2;
  if (packed.size() < own) return Wrong("packed codes have three axes and more", o);
  p.transposed = transposed;
  p.m = x[x.size() - 2], p.k = transposed ? y.back() : x.back(), p.n = packed[packed.size() - own];
  p.blocks = (p.k + kBlock - 1) / kBlock;
  p.row_bytes = is_packed ? p.blocks * packed.back() * 4 : p.k;
  p.groups = scale.back(), p.group = group, p.block_n = block_n;
  if (p.k < 1 || group < 1 || block_n < 1) return Wrong("K, group and block_n are at least 1", o);
  const int64_t padding = transposed && is_packed ? kBlock - 1 : 0;  // of y along K: there are no scales for it
  if ((is_packed ? packed[packed.size() - 2] != p.blocks : packed.back() != p.k) || x.back() != p.depth() ||
      y.back() != p.width() || y[y.size() - 2] != p.m || (p.groups - 1) * group >= p.k ||
      p.groups * group + padding < p.k ||
      scale[scale.size() - 2] != (p.n + block_n - 1) / block_n)
    return Wrong("shapes do not fit each other", o);
  const int64_t batch = Batch(o.y, 2);
  if (Batch(o.x, 2) != batch || Batch(o.packed, own) != batch || Batch(o.scale, 2) != batch)
    return Wrong("leading axes differ", o);
  const int64_t entries = *codes == Codes::kTable16 ? 16 : *codes == Codes::kTable256 ? 256 : 0;
  p.table = *codes == Codes::kInt4 ? kInt4Values.data() : table.begin();
  if (o.role[kCodebook]) {
    if (o.role[kCodebook]->element_type() != ffi::F32 || int64_t(o.role[kCodebook]->element_count()) != batch * entries)
      return Wrong("a codebook has 16 or 256 entries in float32", o);
    p.table = static_cast<const float*>(o.role[kCodebook]->untyped_data());
  } else if (int64_t(table.size()) != entries) {
    return Wrong("the table is not one of the codes' size", o);
  }
  if (o.role[kZeroPoint]) {
    const auto type = NumberOf(o.role[kZeroPoint]->element_type());
    const auto zero = o.role[kZeroPoint]->dimensions();
    if (!type || !std::equal(zero.begin(), zero.end(), scale.begin(), scale.end()))
      return Wrong("zero points are int8 or floats, one for each scale", o);
    p.zero = {o.role[kZeroPoint]->untyped_data(), *type};
  }
  static constexpr float kMiddles[] = {2, 4, 8, 16, 32};
  p.middle = *codes <= Codes::kInt6 ? kMiddles[int(*codes)] : 0;
  p.x = {o.x.untyped_data(), *x_type};
  p.codes = static_cast<const uint8_t*>(o.packed.untyped_data());
  p.scale = {o.scale.untyped_data(), *scale_type};
  p.y = static_cast<float*>(o.y.untyped_data());
  if (!PlaceScales(p)) return Wrong("groups are multiples of 16, or all of K", o);
  if (*x_type == Number::kInt8 && p.scales == Scales::kSixteens)
    return Wrong("with x as int8 groups are multiples of 32 (int4) or 128 (int8), or all of K", o);
  return ffi::Error::Success();
}

// Each of `batch` products at its place.
void Advance(Product& p, const Operands& o, int64_t batch) {
  auto next = [batch](const void* data, ffi::AnyBuffer buffer) {
    return static_cast<const char*>(data) + buffer.size_bytes() / batch;
  };
  p.x.data = next(p.x.data, o.x);
  p.codes = reinterpret_cast<const uint8_t*>(next(p.codes, o.packed));
  p.scale.data = next(p.scale.data, o.scale);
  if (o.role[kZeroPoint]) p.zero.data = next(p.zero.data, *o.role[kZeroPoint]);
  if (o.role[kCodebook]) p.table = reinterpret_cast<const float*>(next(p.table, *o.role[kCodebook]));
  p.y += p.m * p.width();
}

void Run(const Product& p, const Instructions& set, ffi::ThreadPool& pool) {
  for (int64_t m0 = 0; m0 < p.m; m0 += kRowsAtOnce) {
    Rows rows(p, std::min(kRowsAtOnce, p.m - m0));
    auto prepare = [&](int64_t i) { set.prepare(p, m0, rows, i); };
    if (rows.m * p.depth() < kWorkOfATask) {
      for (int64_t i = 0; i < rows.m; ++i) prepare(i);
    } else {
      ParallelFor(pool, rows.m, prepare);
    }
    const int64_t worth = std::max<int64_t>(1, rows.m * p.n * p.k / kWorkOfATask);
    const int64_t for_rows = rows.m <= 2 ? kTasksOfAThreadForOneRow : kTasksOfAThread;
    const int64_t of_a_thread = p.transposed ? kColumnTasksOfAThread : for_rows;
    const int64_t threads = pool.num_threads(), tasks = threads > 1 ? std::min(worth, threads * of_a_thread) : 1;
    const int64_t unit = p.transposed ? kBlock : 32, units = (p.width() + unit - 1) / unit;
    const int64_t step = (units + tasks - 1) / tasks * unit;
    ParallelFor(pool, (p.width() + step - 1) / step, [&](int64_t i) {
      set.multiply(p, m0, rows, i * step, std::min(p.width(), (i + 1) * step));
    });
  }
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scale,
                    ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, int32_t operands, int64_t group,
                    int64_t block_n, ffi::Span<const float> table, bool transposed, std::string_view instructions) {
  Operands o{x, packed, scale, *y, {}};
  size_t next = 0;
  for (int r = 0; r < kRoles; ++r) {
    if (!(operands >> r & 1)) continue;
    auto buffer = rest.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return buffer.error();
    o.role[r] = buffer.value();
  }
  const bool int8_x = x.element_type() == ffi::S8;
  const Instructions* set = int8_x ? Find(kForInt8, instructions) : Find(kForFloats, instructions);
  if (set == nullptr)
    return ffi::Error::InvalidArgument("qjax_cpu_matmul: this machine does not have the instructions '" +
                                       std::string(instructions) + "'");
  if (o.y.element_count() == 0) return ffi::Error::Success();
  Product p{};
  if (ffi::Error error = Describe(o, table, group, block_n, transposed, p); error.failure()) return error;
  const int64_t batch = Batch(o.y, 2);
  for (int64_t i = 0; i < batch; ++i) {
    Run(p, *set, pool);
    Advance(p, o, batch);
  }
  return ffi::Error::Success();
}

ffi::Error QuantizeRows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::BufferR2<ffi::S8>> codes,
                        ffi::Result<ffi::BufferR2<ffi::F32>> scale, std::string_view instructions) {
  const Instructions* set = Find(kForFloats, instructions);
  if (set == nullptr)
    return ffi::Error::InvalidArgument("qjax_cpu_quantize_rows: this machine does not have the instructions '" +
                                       std::string(instructions) + "'");
  const auto shape = x.dimensions(), of_codes = codes->dimensions(), of_scale = scale->dimensions();
  const auto type = NumberOf(x.element_type());
  const bool is_float = type == Number::kF32 || type == Number::kBF16 || type == Number::kF16;
  if (!is_float || shape.size() != 2 || of_codes[0] != shape[0] || of_codes[1] != shape[1] ||
      of_scale[0] != shape[0] || of_scale[1] != 1)
    return ffi::Error::InvalidArgument("qjax_cpu_quantize_rows: x " + Text(x) + " is no f32, bf16 or f16 [M, K], or " +
                                       "results are not codes [M, K] and scale [M, 1]");
  if (!IsAligned(x))
    return ffi::Error::InvalidArgument("qjax_cpu_quantize_rows: x " + Text(x) + " does not begin at a whole element");
  const int64_t m = shape[0], k = shape[1];
  const Array rows{x.untyped_data(), *type};
  const auto quantize = [&](int64_t i) {
    set->quantize_row(rows, i, k, codes->typed_data() + i * k, scale->typed_data() + i);
  };
  if (m * k < kWorkOfATask) {
    for (int64_t i = 0; i < m; ++i) quantize(i);
  } else {
    ParallelFor(pool, m, quantize);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxCpuQuantizeRows, QuantizeRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::S8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxCpuMatmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("operands")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("block_n")
                                  .Attr<ffi::Span<const float>>("table")
                                  .Attr<bool>("transposed")
                                  .Attr<std::string_view>("instructions"));

// What scripts/build-ffi finds in the file: a library runs with this version of XLA's interface and later ones.
#define QJAX_TEXT_OF(x) #x
#define QJAX_TEXT(x) QJAX_TEXT_OF(x)
extern "C" const char QjaxCpuInterface[];
const char QjaxCpuInterface[] = "XLA FFI " QJAX_TEXT(XLA_FFI_API_MAJOR) "." QJAX_TEXT(XLA_FFI_API_MINOR);

// What library.py reads: the instructions of this machine that there are kernels for, best first, separated by spaces.
extern "C" const char* QjaxCpuInstructions() {
  static const std::string names = NamesOf(kForFloats);
  return names.c_str();
}
extern "C" const char* QjaxCpuInt8Instructions() {
  static const std::string names = NamesOf(kForInt8);
  return names.c_str();
}

// What pack_nibbles.py calls: none in `instructions` takes the best. XLA's pool is not at hand: the threads are its own.
extern "C" void QjaxCpuPackNibbles(const NibbleWords* w, const char* instructions, int64_t threads) {
  const auto pack = Find(kForFloats, instructions)->pack_nibbles;
  const int64_t tasks = (w->columns + kColumns - 1) / kColumns;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) pack(*w, i * kColumns);
  };
  std::vector<std::thread> others;
  try {
    while (int64_t(others.size()) + 1 < std::min(threads, tasks)) others.emplace_back(work);
  } catch (const std::system_error&) {  // as many as the system gives
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace qjax::cpu
