// The handlers as XLA's CPU backend can run them, for tests: there is no stream, and no initialize stage. cuBLASLt is
// the library at FAKE_CUBLASLT, whatever name is asked for.
#include <dlfcn.h>

static void* OpenFake() { return dlopen(FAKE_CUBLASLT, RTLD_NOW | RTLD_LOCAL); }
#define dlopen(name, flags) ((void)(name), (void)(flags), OpenFake())
#include "handlers.cc"

namespace qjax {

static ffi::Error HostExecute(int32_t device, State* state, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace,
                              ffi::RemainingRets more) {
  if (ffi::Error error = Initialize(device, state, x, w, rest, y, workspace, more); error.failure()) return error;
  return Execute(nullptr, device, state, x, w, rest, y, workspace, more);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(QjaxHostExecute, HostExecute,
                              ffi::Ffi::BindExecute().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::State<State>>() QJAX_BUFFERS);

}  // namespace qjax
