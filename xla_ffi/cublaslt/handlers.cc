// XLA FFI handlers of one custom call, `qjax_cublaslt_matmul`:
//
//     y[b] = residual[b] + epilogue(scales * x[b] @ w[b]^T + bias[b])        b over the leading axes
//
// Operands, row-major, in this order; those after w only where their bit of the attribute `operands` is set:
//     x [.., M, K]   w [.., N, K]   x_scale, w_scale (layout by mode: see call.py)   bias [.., N]
//     residual [.., M, N]   out_scale [.., 1]
// Results: y [.., M, N], a workspace of bytes (XLA's temporary memory, whose address a captured graph may keep), and
// where there is an out_scale amax [.., 4], of which the first counts. A leading axis of 1 broadcasts. uint8 operands hold two e2m1 codes a byte.
//
// Stages: instantiate keeps the attributes (it also runs on machines without a GPU); initialize, before every run and
// never inside a captured graph, makes handle and plan once per (call site, device); execute only launches.
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cublaslt_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" int64_t QjaxCublasLtVersion();

namespace qjax {
namespace {

enum Role { kXScale, kWScale, kBias, kResidual, kOutScale, kRoles };

struct Attributes {
  int32_t operands;        // bit r: the operand of role r is there
  int32_t x_mode, w_mode;  // cublasLtMatmulMatrixScale_t
  int32_t fast_accum;
  int32_t epilogue;        // cublasLtEpilogue_t
  int32_t candidate;       // which of the heuristic's results; the last where it has fewer

  bool Has(Role role) const { return (operands >> role) & 1; }
};

struct Operands {
  ffi::AnyBuffer x, w, y, workspace;
  std::array<std::optional<ffi::AnyBuffer>, kRoles> role;
  std::optional<ffi::AnyBuffer> amax;
};

ffi::ErrorOr<Operands> Gather(const Attributes& attributes, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                              ffi::RemainingRets more) {
  Operands o{x, w, *y, *workspace, {}, {}};
  size_t next = 0;
  for (int r = 0; r < kRoles; ++r) {
    if (!attributes.Has(Role(r))) continue;
    auto buffer = rest.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    o.role[r] = buffer.value();
  }
  if (attributes.Has(kOutScale)) {
    auto buffer = more.get<ffi::AnyBuffer>(0);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    o.amax = *buffer.value();
  }
  return o;
}

std::optional<lt::DataType> CudaType(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return lt::kF32;
    case ffi::F16: return lt::kF16;
    case ffi::BF16: return lt::kBF16;
    case ffi::S8: return lt::kS8;
    case ffi::S32: return lt::kS32;
    case ffi::F8E4M3FN: return lt::kE4M3;
    case ffi::F8E5M2: return lt::kE5M2;
    case ffi::U8: return lt::kE2M1;
    default: return std::nullopt;
  }
}

// What a call looks like, for error messages: "f8e4m3fn[4,2048,4096]".
std::string Text(ffi::AnyBuffer buffer) {
  std::ostringstream out;
  out << static_cast<XLA_FFI_DataType>(buffer.element_type()) << "[";
  const char* separator = "";
  for (int64_t size : buffer.dimensions()) out << std::exchange(separator, ",") << size;
  out << "]";
  return out.str();
}

ffi::Error Failure(const char* call, lt::Status status, const Attributes& attributes, const Operands& o) {
  static constexpr const char* kNames[kRoles] = {"x_scale", "w_scale", "bias", "residual", "out_scale"};
  std::ostringstream out;
  const char* name = lt::Get().GetStatusName ? lt::Get().GetStatusName(status) : "?";
  out << call << ": " << name << " (" << status << ") for y " << Text(o.y) << " = x " << Text(o.x) << " @ w "
      << Text(o.w) << "^T";
  for (int r = 0; r < kRoles; ++r)
    if (o.role[r]) out << ", " << kNames[r] << " " << Text(*o.role[r]);
  out << ", scale modes " << attributes.x_mode << " and " << attributes.w_mode << ", epilogue " << attributes.epilogue
      << ", fast_accum " << attributes.fast_accum << ", cuBLASLt " << QjaxCublasLtVersion();
  return ffi::Error::Internal(out.str());
}

// The leading axes of a call: where each operand of batch b lies.
class Batch {
 public:
  explicit Batch(ffi::AnyBuffer y) {
    auto dims = y.dimensions();
    axes_.assign(dims.begin(), dims.end() - 2);
  }

  int64_t count() const { return std::accumulate(axes_.begin(), axes_.end(), int64_t{1}, std::multiplies<>()); }

  // Whether the buffer's leading axes are those of y, or 1.
  bool Fits(ffi::AnyBuffer buffer) const {
    auto dims = buffer.dimensions();
    if (dims.size() < axes_.size()) return false;
    for (size_t i = 0; i < axes_.size(); ++i)
      if (dims[i] != axes_[i] && dims[i] != 1) return false;
    return true;
  }

  // Bytes of one element of the batch.
  size_t Stride(ffi::AnyBuffer buffer) const {
    auto dims = buffer.dimensions();
    int64_t matrices = std::accumulate(dims.begin(), dims.begin() + axes_.size(), int64_t{1}, std::multiplies<>());
    return buffer.size_bytes() / matrices;
  }

  char* At(ffi::AnyBuffer buffer, int64_t index) const {
    auto dims = buffer.dimensions();
    int64_t offset = 0, step = 1;
    for (size_t i = axes_.size(); i-- > 0;) {
      if (dims[i] != 1) {
        offset += index % axes_[i] * step;
        step *= dims[i];
      }
      index /= axes_[i];
    }
    return static_cast<char*>(buffer.untyped_data()) + offset * Stride(buffer);
  }

 private:
  std::vector<int64_t> axes_;
};

struct Shape {
  int64_t m, n, k;
  lt::DataType x, w, y;
  bool integer() const { return x == lt::kS8; }
  bool narrow() const { return x == lt::kE4M3 || x == lt::kE5M2 || x == lt::kE2M1; }
};

ffi::ErrorOr<Shape> ShapeOf(const Attributes& attributes, const Operands& o) {
  auto wrong = [&](const char* what) { return ffi::Unexpected(Failure(what, 0, attributes, o)); };
  auto x = o.x.dimensions(), w = o.w.dimensions(), y = o.y.dimensions();
  size_t rank = y.size();
  if (rank < 2 || x.size() != rank || w.size() != rank) return wrong("x, w and y differ in rank");
  if (x[rank - 1] != w[rank - 1] || y[rank - 2] != x[rank - 2] || y[rank - 1] != w[rank - 2])
    return wrong("want x [.., M, K], w [.., N, K], y [.., M, N]");
  Batch batch(o.y);
  if (!batch.Fits(o.x) || !batch.Fits(o.w)) return wrong("leading axes do not fit");
  for (const auto& buffer : o.role)
    if (buffer && !batch.Fits(*buffer)) return wrong("leading axes of an optional operand do not fit");
  auto x_type = CudaType(o.x.element_type()), w_type = CudaType(o.w.element_type());
  auto y_type = CudaType(o.y.element_type());
  if (!x_type || !w_type || !y_type) return wrong("an element type that cuBLASLt does not have");
  int64_t k = x[rank - 1] * (*x_type == lt::kE2M1 ? 2 : 1);
  return Shape{y[rank - 2], y[rank - 1], k, *x_type, *w_type, *y_type};
}

// Descriptors and algorithm of one call site on one device.
struct Plan {
  std::mutex mutex;  // the descriptor's pointers change with every launch
  void *desc = nullptr, *a = nullptr, *b = nullptr, *c = nullptr, *d = nullptr;
  lt::Heuristic chosen{};
  bool integer = false;

  ~Plan() {
    if (desc) lt::Get().MatmulDescDestroy(desc);
    for (void* layout : {a, b, c, d})
      if (layout) lt::Get().MatrixLayoutDestroy(layout);
  }
};

#define QJAX_LT(function, ...)                                                        \
  if (lt::Status status = lt::Get().function(__VA_ARGS__); status != lt::kSuccess) \
    return Failure("cublasLt" #function, status, attributes, o);

template <typename T>
lt::Status Set(void* desc, lt::DescAttribute attribute, T value) {
  return lt::Get().MatmulDescSetAttribute(desc, attribute, &value, sizeof(value));
}

#define QJAX_SET(attribute, value)                                                   \
  if (lt::Status status = Set(plan.desc, lt::attribute, value); status != lt::kSuccess) \
    return Failure("cublasLtMatmulDescSetAttribute(" #attribute ")", status, attributes, o);

// The scale, bias and amax pointers of batch element `index`; of any element, they decide what the heuristic answers.
ffi::Error SetPointers(Plan& plan, const Attributes& attributes, const Operands& o, const Batch& batch, int64_t index) {
  auto at = [&](Role role) -> const void* { return batch.At(*o.role[role], index); };
  if (o.role[kWScale]) QJAX_SET(kAScalePointer, at(kWScale));
  if (o.role[kXScale]) QJAX_SET(kBScalePointer, at(kXScale));
  if (o.role[kBias]) QJAX_SET(kBiasPointer, at(kBias));
  if (o.role[kOutScale]) {
    QJAX_SET(kDScalePointer, at(kOutScale));
    QJAX_SET(kAmaxDPointer, static_cast<void*>(batch.At(*o.amax, index)));
  }
  return ffi::Error::Success();
}

// cuBLASLt counts columns first: y^T [N, M] = w [N, K] * x^T [K, M], so that its A is w, transposed, and its B is x.
// This TN form is the only one that FP8 has on Ada and Hopper.
ffi::Error Build(Plan& plan, const Attributes& attributes, const Operands& o, const Shape& shape) {
  plan.integer = shape.integer();
  QJAX_LT(MatmulDescCreate, &plan.desc, plan.integer ? lt::kCompute32I : lt::kCompute32F,
          plan.integer ? lt::kS32 : lt::kF32);
  QJAX_SET(kTransA, lt::kTransposed);
  QJAX_SET(kTransB, lt::kNormal);
  if (attributes.epilogue != 1) QJAX_SET(kEpilogue, attributes.epilogue);
  if (shape.narrow()) {
    QJAX_SET(kFastAccum, static_cast<int8_t>(attributes.fast_accum));
    // Mode 0, a scalar, is the default: libraries before 12.8 do not know the attribute.
    if (attributes.w_mode) QJAX_SET(kAScaleMode, attributes.w_mode);
    if (attributes.x_mode) QJAX_SET(kBScaleMode, attributes.x_mode);
  }
  if (o.role[kBias]) QJAX_SET(kBiasType, static_cast<int32_t>(*CudaType(o.role[kBias]->element_type())));
  // C has y's type, or bfloat16 where y has eight bits; without a residual it is not read.
  lt::DataType c_type = o.role[kOutScale] ? lt::kBF16 : shape.y;
  if (o.role[kResidual]) c_type = *CudaType(o.role[kResidual]->element_type());
  QJAX_LT(MatrixLayoutCreate, &plan.a, shape.w, shape.k, shape.n, shape.k);
  QJAX_LT(MatrixLayoutCreate, &plan.b, shape.x, shape.k, shape.m, shape.k);
  QJAX_LT(MatrixLayoutCreate, &plan.c, c_type, shape.n, shape.m, shape.n);
  QJAX_LT(MatrixLayoutCreate, &plan.d, shape.y, shape.n, shape.m, shape.n);
  return ffi::Error::Success();
}

// The alignment that every matrix of a batch has: XLA's buffers and slices start at multiples of 128 bytes.
uint32_t Alignment(const Batch& batch, ffi::AnyBuffer buffer) {
  size_t stride = batch.count() == 1 ? 128 : batch.Stride(buffer) | 128;
  return static_cast<uint32_t>(stride & -stride);
}

ffi::Error Choose(Plan& plan, int32_t device, const Attributes& attributes, const Operands& o, const Batch& batch) {
  void* handle = nullptr;
  if (lt::Status status = lt::HandleFor(device, &handle)) return Failure("cublasLtCreate", status, attributes, o);
  void* made = nullptr;
  QJAX_LT(MatmulPreferenceCreate, &made);
  std::unique_ptr<void, lt::Status (*)(void*)> preference(made, lt::Get().MatmulPreferenceDestroy);
  size_t bytes = o.workspace.size_bytes();
  QJAX_LT(MatmulPreferenceSetAttribute, made, lt::kMaxWorkspace, &bytes, sizeof(bytes));
  const std::pair<lt::PreferenceAttribute, uint32_t> alignments[] = {
      {lt::kMinAlignmentA, Alignment(batch, o.w)},
      {lt::kMinAlignmentB, Alignment(batch, o.x)},
      {lt::kMinAlignmentC, Alignment(batch, o.role[kResidual].value_or(o.y))},
      {lt::kMinAlignmentD, Alignment(batch, o.y)},
  };
  for (const auto& [attribute, alignment] : alignments)
    QJAX_LT(MatmulPreferenceSetAttribute, made, attribute, &alignment, sizeof(alignment));
  std::vector<lt::Heuristic> found(attributes.candidate + 1);
  int got = 0;
  QJAX_LT(MatmulAlgoGetHeuristic, handle, plan.desc, plan.a, plan.b, plan.c, plan.d, made, attributes.candidate + 1,
          found.data(), &got);
  while (got > 0 && found[got - 1].state != lt::kSuccess) --got;
  if (got == 0) return Failure("cublasLtMatmulAlgoGetHeuristic found nothing", lt::kNotSupported, attributes, o);
  plan.chosen = found[got - 1];
  return ffi::Error::Success();
}

// What one call site keeps between runs.
struct State {
  static ffi::TypeId id;
  static ffi::TypeInfo info;
  Attributes attributes;
  std::mutex mutex;
  std::map<int32_t, std::unique_ptr<Plan>> plans;  // by device

  Plan* Find(int32_t device) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = plans.find(device);
    return found == plans.end() ? nullptr : found->second.get();
  }
};
ffi::TypeId State::id = {};
ffi::TypeInfo State::info = ffi::MakeTypeInfo<State>();

ffi::ErrorOr<std::unique_ptr<State>> Instantiate(int32_t operands, int32_t x_mode, int32_t w_mode, int32_t fast_accum,
                                                 int32_t epilogue, int32_t candidate) {
  auto state = std::make_unique<State>();
  state->attributes = {operands, x_mode, w_mode, fast_accum, epilogue, candidate};
  return state;
}

ffi::Error Initialize(int32_t device, State* state, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace, ffi::RemainingRets more) {
  if (state->Find(device)) return ffi::Error::Success();
  if (!lt::Get().error.empty()) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, lt::Get().error);
  const Attributes& attributes = state->attributes;
  auto gathered = Gather(attributes, x, w, rest, y, workspace, more);
  if (gathered.has_error()) return gathered.error();
  const Operands& o = gathered.value();
  auto shape = ShapeOf(attributes, o);
  if (shape.has_error()) return shape.error();
  Batch batch(o.y);
  auto plan = std::make_unique<Plan>();
  if (ffi::Error error = Build(*plan, attributes, o, shape.value()); error.failure()) return error;
  if (ffi::Error error = SetPointers(*plan, attributes, o, batch, 0); error.failure()) return error;
  if (ffi::Error error = Choose(*plan, device, attributes, o, batch); error.failure()) return error;
  std::lock_guard<std::mutex> lock(state->mutex);
  state->plans.emplace(device, std::move(plan));  // keeps the first of two threads' plans
  return ffi::Error::Success();
}

ffi::Error Execute(void* stream, int32_t device, State* state, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                   ffi::RemainingRets more) {
  const Attributes& attributes = state->attributes;
  auto gathered = Gather(attributes, x, w, rest, y, workspace, more);
  if (gathered.has_error()) return gathered.error();
  const Operands& o = gathered.value();
  Plan* plan = state->Find(device);
  if (plan == nullptr) return Failure("execute ran before initialize", 0, attributes, o);
  void* handle = nullptr;
  if (lt::Status status = lt::HandleFor(device, &handle)) return Failure("cublasLtCreate", status, attributes, o);
  static constexpr float kFloat[] = {0, 1};
  static constexpr int32_t kInteger[] = {0, 1};
  auto number = [&](int i) { return plan->integer ? static_cast<const void*>(kInteger + i) : kFloat + i; };
  Batch batch(o.y);
  ffi::AnyBuffer c = o.role[kResidual].value_or(o.y);
  std::lock_guard<std::mutex> lock(plan->mutex);
  for (int64_t i = 0; i < batch.count(); ++i) {
    if (ffi::Error error = SetPointers(*plan, attributes, o, batch, i); error.failure()) return error;
    QJAX_LT(Matmul, handle, plan->desc, number(1), batch.At(o.w, i), plan->a, batch.At(o.x, i), plan->b,
            number(o.role[kResidual] ? 1 : 0), batch.At(c, i), plan->c, batch.At(o.y, i), plan->d,
            plan->chosen.algo, o.workspace.untyped_data(), o.workspace.size_bytes(), stream);
  }
  return ffi::Error::Success();
}

}  // namespace

#define QJAX_BUFFERS                                                                                         \
  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().RemainingArgs().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>() \
      .RemainingRets()

XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxCublasLtInstantiate, Instantiate,
                              ffi::Ffi::BindInstantiate()
                                  .Attr<int32_t>("operands")
                                  .Attr<int32_t>("x_mode")
                                  .Attr<int32_t>("w_mode")
                                  .Attr<int32_t>("fast_accum")
                                  .Attr<int32_t>("epilogue")
                                  .Attr<int32_t>("candidate"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxCublasLtInitialize, Initialize,
                              ffi::Ffi::BindInitialize()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::State<State>>() QJAX_BUFFERS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxCublasLtExecute, Execute,
                              ffi::Ffi::BindExecute()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::State<State>>() QJAX_BUFFERS,
                              {ffi::Traits::kCmdBufferCompatible});

// What scripts/build-ffi finds in the file: a library runs with this version of XLA's interface and later ones.
#define QJAX_TEXT_OF(x) #x
#define QJAX_TEXT(x) QJAX_TEXT_OF(x)
extern "C" const char QjaxCublasLtInterface[];
const char QjaxCublasLtInterface[] = "XLA FFI " QJAX_TEXT(XLA_FFI_API_MAJOR) "." QJAX_TEXT(XLA_FFI_API_MINOR);

// What library.py reads.
extern "C" {
void* QjaxCublasLtTypeId() { return &State::id; }
void* QjaxCublasLtTypeInfo() { return &State::info; }
// Why the library cannot be used here; empty if it can.
const char* QjaxCublasLtMissing() { return lt::Get().error.c_str(); }
int64_t QjaxCublasLtVersion() { return lt::Get().GetVersion ? static_cast<int64_t>(lt::Get().GetVersion()) : 0; }
}

}  // namespace qjax
