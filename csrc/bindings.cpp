// timerome._C: functions that take addresses, sizes, a device index and a stream handle.
//
// No torch headers, so one build serves every torch version and torch is no build requirement. All checks, allocation
// and registration are in Python (timerome/ops): nothing here may be called with unchecked arguments.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py
#include "kernels.h"

namespace py = pybind11;
using timerome::cuda_error_string;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef TIMEROME_WITH_CUDA
void check(int error, const char* function) {
  if (error) throw std::runtime_error(std::string(function) + ": CUDA error: " + cuda_error_string(error));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of timerome. Private: use timerome.ops.";
  m.attr("built_for") = TIMEROME_BUILT_FOR;
  m.attr("cuda_archs") = TIMEROME_CUDA_ARCHS;
  m.attr("cuda_why_not") = TIMEROME_CUDA_WHY_NOT;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "sparsify_add_cpu",
      [](Address h, Address r, Address out, Address mask, int64_t rows, int64_t d, int64_t k, double alpha, int dtype,
         int threads) {
        timerome::sparsify_add_cpu(at<void>(h), at<float>(r), at<void>(out), at<uint8_t>(mask), rows, d, k,
                                   float(alpha), dtype, threads);
      },
      nogil);
  m.attr("lowrank_cpu_supported") = timerome::lowrank_cpu_supported();
  m.def(
      "lowrank_cpu",
      [](Address h, Address keys, Address coef, Address values, Address mean, Address mask, Address out, Address hits,
         int64_t first, int64_t last, int64_t length, int64_t d, int64_t n, int64_t columns, int64_t coef_stride,
         int64_t k, double alpha, double tau, bool gated, int dtype, int threads) {
        timerome::lowrank_cpu({at<void>(h), at<float>(keys), at<float>(coef), at<float>(values), at<float>(mean),
                               at<uint8_t>(mask), at<void>(out), at<int64_t>(hits), first, last, length, d, n, columns,
                               coef_stride, k, float(alpha), float(tau), gated, dtype, threads});
      },
      nogil);
  m.def(
      "expand_add_cpu",
      [](Address h, Address c, Address values, Address index, Address out, int64_t first, int64_t count, int64_t d,
         int64_t columns, int64_t k, double alpha, int dtype, int threads) {
        timerome::expand_add_cpu({at<void>(h), at<float>(c), at<float>(values), at<int64_t>(index), at<void>(out), first,
                                  count, d, columns, k, float(alpha), dtype, threads});
      },
      nogil);
  m.def("prefer_large_pages",
        [](Address memory, int64_t bytes) { timerome::prefer_large_pages(at<void>(memory), bytes); });
  m.def(
      "cholesky_append_cpu",
      [](Address L, int64_t ldl, Address g, double gnn, Address out, int64_t ldo, int64_t n) {
        return timerome::cholesky_append_cpu(at<double>(L), ldl, at<double>(g), gnn, at<double>(out), ldo, n);
      },
      nogil);
  m.def(
      "cholesky_delete_cpu",
      [](Address L, Address out, int64_t n, int64_t j) {
        timerome::cholesky_delete_cpu(at<double>(L), at<double>(out), n, j);
      },
      nogil);

#ifdef TIMEROME_WITH_CUDA
  m.attr("built_with_cuda") = true;
  m.attr("sparsify_add_cuda_max_d") = timerome::kSparsifyAddCudaMaxD;
  m.def("cuda_probe", [] {
    int devices = 0, runtime = 0, driver = 0;
    int error = timerome::cuda_device_count(&devices);
    if (const int e = timerome::cuda_versions(&runtime, &driver)) error = error ? error : e;
    return py::make_tuple(error ? cuda_error_string(error) : "", devices, runtime, driver);
  });
  m.def(
      "sparsify_add_cuda",
      [](Address h, Address r, Address out, Address mask, int64_t rows, int64_t d, int64_t k, double alpha, int dtype,
         int device, Address stream) {
        check(timerome::sparsify_add_cuda(at<void>(h), at<float>(r), at<void>(out), at<uint8_t>(mask), rows, d, k,
                                          float(alpha), dtype, device, at<void>(stream)),
              "sparsify_add");
      },
      nogil);
  m.attr("lowrank_cuda_max_n") = timerome::kLowrankCudaMaxN;
  m.def("lowrank_cuda_max_d", [](int device, int64_t n, int64_t m) {
    int64_t d = 0;
    check(timerome::lowrank_cuda_max_d(device, n, m, &d), "sparse_lowrank_residual");
    return d;
  });
  m.def("lowrank_cuda_scratch", [](int64_t rows, int64_t d, int64_t n, int dtype, int device) {
    int64_t floats = 0;
    check(timerome::lowrank_cuda_scratch(rows, d, n, dtype, device, &floats), "sparse_lowrank_residual");
    return floats;
  });
  m.def(
      "lowrank_cuda",
      [](Address h, Address out, Address keys, Address coef, Address values, Address mean, Address mask,
         Address scratch, Address hits, int64_t rows, int64_t length, int64_t d, int64_t n, int64_t columns, int64_t k,
         double alpha, double tau, bool gated, int dtype, int keys_dtype, int values_dtype, int device,
         Address stream) {
        timerome::LowrankCuda a = {};
        a.h = at<void>(h), a.out = at<void>(out), a.keys = at<void>(keys), a.coef = at<float>(coef);
        a.values = at<void>(values), a.mean = at<float>(mean), a.mask = at<uint8_t>(mask);
        a.scratch = at<float>(scratch), a.hits = at<unsigned long long>(hits);
        a.rows = rows, a.length = length, a.d = d, a.n = n, a.m = columns, a.k = k;
        a.alpha = float(alpha), a.tau = float(tau), a.gated = gated;
        a.dtype = dtype, a.keys_dtype = keys_dtype, a.values_dtype = values_dtype;
        check(timerome::lowrank_cuda(a, device, at<void>(stream)), "sparse_lowrank_residual");
      },
      nogil);
  m.attr("gram_cuda_max_n") = timerome::kGramCudaMaxN;
  m.def("gram_cuda_splits", [](int64_t batch, int64_t d, int device) {
    int64_t splits = 0;
    check(timerome::gram_cuda_splits(batch, d, device, &splits), "ridge_cholesky");
    return splits;
  });
  m.def(
      "gram_cuda",
      [](Address keys, Address lengths, Address gram, int64_t batch, int64_t n, int64_t d, int64_t splits, int dtype,
         int device, Address stream) {
        check(timerome::gram_cuda(at<void>(keys), at<int64_t>(lengths), at<double>(gram), batch, n, d, splits, dtype,
                                  device, at<void>(stream)),
              "ridge_cholesky");
      },
      nogil);
  m.def("ridge_cuda_max_n", [](int device) {
    int64_t n = 0;
    check(timerome::ridge_cuda_max_n(device, &n), "ridge_cholesky");
    return n;
  });
  m.def(
      "ridge_cuda",
      [](Address gram, Address ridge, Address lengths, Address inverse, Address cholesky, Address info, int64_t systems,
         int64_t batch, int64_t n, int device, Address stream) {
        check(timerome::ridge_cuda(at<double>(gram), at<double>(ridge), at<int64_t>(lengths), at<double>(inverse),
                                   at<double>(cholesky), at<int>(info), systems, batch, n, device, at<void>(stream)),
              "ridge_cholesky");
      },
      nogil);
#else
  m.attr("built_with_cuda") = false;
#endif
}
