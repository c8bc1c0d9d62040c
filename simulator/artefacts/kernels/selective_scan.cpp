// selective_scan_cuda for CPU tensors: the call signatures, argument checks and results of mamba_ssm 2.2.4, without
// a GPU. Everything is computed in float32 on plain buffers and rounded once when it is stored, as a CUDA kernel
// does. It runs below autograd, so the backward pass is written out. A complex A is refused.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// The scan's intermediates are kept once for each so many positions.
constexpr int64_t kChunk = 2048;
constexpr int64_t kMaxState = 256;
// Beyond it, softplus(x) is x, in upstream and in torch.
constexpr float kSoftplusThreshold = 20.f;

void check_device(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor: this build of selective_scan_cuda has no GPU code");
}

void check_dtype(const at::Tensor& tensor, at::ScalarType expected, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == expected, name, " must be ", toString(expected), ", not ",
              toString(tensor.scalar_type()));
}

void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", not ", tensor.sizes());
}

void check_layout(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.stride(-1) == 1 || tensor.size(-1) == 1, name, " must be contiguous along its last dimension");
}

// A contiguous float32 copy that shares no memory with the argument: outputs may alias inputs.
at::Tensor as_float(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous))
      .copy_(tensor);
}

at::Tensor float_buffer(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions().dtype(at::kFloat)).zero_();
}

at::Tensor like(const at::Tensor& pattern, const at::Tensor& values) { return at::empty_like(pattern).copy_(values); }

float sigmoid(float value) { return 1.f / (1.f + std::exp(-value)); }

struct Shape {
  int64_t batch, dim, length, states, groups, chunks;
  bool variable_b, variable_c;
};

void check_full(const at::Tensor& tensor, const at::Tensor& u, const Shape& shape, const char* name) {
  check_dtype(tensor, u.scalar_type(), name);
  check_device(tensor, name);
  check_shape(tensor, {shape.batch, shape.dim, shape.length}, name);
  check_layout(tensor, name);
}

void check_per_channel(const OptionalTensor& tensor, const Shape& shape, const char* name) {
  if (!tensor) return;
  check_dtype(*tensor, at::kFloat, name);
  check_device(*tensor, name);
  check_shape(*tensor, {shape.dim}, name);
  check_layout(*tensor, name);
}

void check_projection(const at::Tensor& tensor, bool variable, const at::Tensor& u, const Shape& shape,
                      const char* name) {
  check_device(tensor, name);
  if (!variable) {
    check_dtype(tensor, at::kFloat, name);
    check_shape(tensor, {shape.dim, shape.states}, name);
    return;
  }
  check_dtype(tensor, u.scalar_type(), name);
  check_shape(tensor, {shape.batch, shape.groups, shape.states, shape.length}, name);
  check_layout(tensor, name);
}

Shape check_inputs(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                   const at::Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& delta_bias) {
  const auto type = u.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
              "u must be float32, float16 or bfloat16, not ", toString(type));
  TORCH_CHECK(A.scalar_type() != at::kComplexFloat,
              "complex A is not implemented in this CPU build of selective_scan_cuda: use a real A");
  check_dtype(A, at::kFloat, "A");
  check_device(u, "u");
  check_device(A, "A");
  TORCH_CHECK(u.dim() == 3, "u must have shape (batch, dim, seqlen), not ", u.sizes());
  TORCH_CHECK(A.dim() == 2, "A must have shape (dim, dstate), not ", A.sizes());
  Shape shape{u.size(0), u.size(1), u.size(2), A.size(1), 1, 0, B.dim() >= 3, C.dim() >= 3};
  shape.chunks = (shape.length + kChunk - 1) / kChunk;
  // C's number of groups follows B's, upstream too.
  if (shape.variable_b) shape.groups = B.size(1);
  TORCH_CHECK(shape.states <= kMaxState, "selective_scan only supports state dimension <= 256");
  TORCH_CHECK(shape.length > 0, "u must hold at least one position");
  TORCH_CHECK(shape.groups > 0 && shape.dim % shape.groups == 0, "dim must be a multiple of B's number of groups");
  check_layout(u, "u");
  check_full(delta, u, shape, "delta");
  check_shape(A, {shape.dim, shape.states}, "A");
  check_projection(B, shape.variable_b, u, shape, "B");
  check_projection(C, shape.variable_c, u, shape, "C");
  check_per_channel(D, shape, "D");
  check_per_channel(delta_bias, shape, "delta_bias");
  if (z) check_full(*z, u, shape, "z");
  return shape;
}

// Where B or C of one channel and state lies in its contiguous buffer: the same value for all positions, or a row.
int64_t projection_offset(bool variable, const Shape& shape, int64_t b, int64_t d, int64_t n) {
  if (!variable) return d * shape.states + n;
  const int64_t group = d / (shape.dim / shape.groups);
  return ((b * shape.groups + group) * shape.states + n) * shape.length;
}

// The step sizes of one channel, after bias and softplus; `slope` gets their derivative by the given delta.
void load_steps(const float* delta, float bias, bool softplus, std::vector<float>& step, std::vector<float>& slope) {
  for (size_t t = 0; t < step.size(); ++t) {
    const float value = delta[t] + bias;
    const bool soft = softplus && value <= kSoftplusThreshold;
    step[t] = soft ? std::log1p(std::exp(value)) : value;
    slope[t] = soft ? sigmoid(value) : 1.f;
  }
}

std::vector<at::Tensor> selective_scan_fwd(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                                           const at::Tensor& B, const at::Tensor& C, const OptionalTensor& D,
                                           const OptionalTensor& z, const OptionalTensor& delta_bias,
                                           bool delta_softplus) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Shape shape = check_inputs(u, delta, A, B, C, D, z, delta_bias);
  const at::Tensor u_f = as_float(u), delta_f = as_float(delta), a_f = as_float(A), b_f = as_float(B),
                   c_f = as_float(C);
  const at::Tensor skip_f = D ? as_float(*D) : at::Tensor(), bias_f = delta_bias ? as_float(*delta_bias) : at::Tensor();
  const at::Tensor z_f = z ? as_float(*z) : at::Tensor();
  at::Tensor out_f = float_buffer({shape.batch, shape.dim, shape.length});
  at::Tensor gated_f = z ? float_buffer({shape.batch, shape.dim, shape.length}) : at::Tensor();
  // At each chunk's end, for each state: the product of all decays so far, and the state.
  at::Tensor x = float_buffer({shape.batch, shape.dim, shape.chunks, 2 * shape.states});
  std::vector<float> step(shape.length), slope(shape.length);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t d = 0; d < shape.dim; ++d) {
      const int64_t channel = b * shape.dim + d;
      const float* input = u_f.const_data_ptr<float>() + channel * shape.length;
      float* result = out_f.data_ptr<float>() + channel * shape.length;
      float* kept = x.data_ptr<float>() + channel * shape.chunks * 2 * shape.states;
      const float skip = D ? skip_f.const_data_ptr<float>()[d] : 0.f;
      load_steps(delta_f.const_data_ptr<float>() + channel * shape.length,
                 delta_bias ? bias_f.const_data_ptr<float>()[d] : 0.f, delta_softplus, step, slope);
      for (int64_t t = 0; t < shape.length; ++t) result[t] = skip * input[t];
      for (int64_t n = 0; n < shape.states; ++n) {
        const float rate = a_f.const_data_ptr<float>()[d * shape.states + n];
        const float* in = b_f.const_data_ptr<float>() + projection_offset(shape.variable_b, shape, b, d, n);
        const float* out = c_f.const_data_ptr<float>() + projection_offset(shape.variable_c, shape, b, d, n);
        float state = 0.f, decayed = 1.f;
        for (int64_t t = 0; t < shape.length; ++t) {
          const float decay = std::exp(step[t] * rate);
          decayed *= decay;
          state = decay * state + step[t] * in[shape.variable_b ? t : 0] * input[t];
          result[t] += state * out[shape.variable_c ? t : 0];
          if ((t + 1) % kChunk == 0 || t + 1 == shape.length) {
            float* slot = kept + (t / kChunk * shape.states + n) * 2;
            slot[0] = decayed;
            slot[1] = state;
          }
        }
      }
      if (z) {
        const float* gate = z_f.const_data_ptr<float>() + channel * shape.length;
        float* gated = gated_f.data_ptr<float>() + channel * shape.length;
        for (int64_t t = 0; t < shape.length; ++t) gated[t] = result[t] * gate[t] * sigmoid(gate[t]);
      }
    }
  }
  // Upstream's out has delta's layout, not u's.
  std::vector<at::Tensor> results = {like(delta, out_f), x};
  if (z) results.push_back(like(*z, gated_f));
  return results;
}

std::vector<at::Tensor> selective_scan_bwd(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                                           const at::Tensor& B, const at::Tensor& C, const OptionalTensor& D,
                                           const OptionalTensor& z, const OptionalTensor& delta_bias,
                                           const at::Tensor& dout, const OptionalTensor& x, const OptionalTensor& out,
                                           OptionalTensor& dz, bool delta_softplus, bool recompute_out_z) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Shape shape = check_inputs(u, delta, A, B, C, D, z, delta_bias);
  check_full(dout, u, shape, "dout");
  at::Tensor dz_out;
  if (z) {
    TORCH_CHECK(out.has_value(), "out must be given with z");
    check_full(*out, u, shape, "out");
    if (dz) check_full(*dz, u, shape, "dz");
    dz_out = dz ? *dz : at::empty_like(*z);
  }
  // The states are computed anew, so x is only checked.
  TORCH_CHECK(shape.chunks <= 1 || x.has_value(), "x must be given for sequences of more than ", kChunk, " positions");
  if (x) {
    check_dtype(*x, at::kFloat, "x");
    check_device(*x, "x");
    TORCH_CHECK(x->is_contiguous(), "x must be contiguous");
    check_shape(*x, {shape.batch, shape.dim, shape.chunks, 2 * shape.states}, "x");
  }
  const at::Tensor u_f = as_float(u), delta_f = as_float(delta), a_f = as_float(A), b_f = as_float(B),
                   c_f = as_float(C), dout_f = as_float(dout);
  const at::Tensor skip_f = D ? as_float(*D) : at::Tensor(), bias_f = delta_bias ? as_float(*delta_bias) : at::Tensor();
  const at::Tensor z_f = z ? as_float(*z) : at::Tensor(), ungated_f = z ? as_float(*out) : at::Tensor();
  at::Tensor du_f = float_buffer(u.sizes()), ddelta_f = float_buffer(u.sizes());
  at::Tensor da_f = float_buffer(A.sizes()), db_f = float_buffer(B.sizes()), dc_f = float_buffer(C.sizes());
  at::Tensor dskip_f = float_buffer({shape.dim}), dbias_f = float_buffer({shape.dim});
  at::Tensor dz_f = z ? float_buffer(u.sizes()) : at::Tensor();
  at::Tensor gated_f = z && recompute_out_z ? float_buffer(u.sizes()) : at::Tensor();
  std::vector<float> step(shape.length), slope(shape.length), dstep(shape.length), dresult(shape.length);
  std::vector<float> decay(shape.length), states(shape.length);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t d = 0; d < shape.dim; ++d) {
      const int64_t channel = b * shape.dim + d, start = channel * shape.length;
      const float* input = u_f.const_data_ptr<float>() + start;
      float* dinput = du_f.data_ptr<float>() + start;
      const float skip = D ? skip_f.const_data_ptr<float>()[d] : 0.f;
      load_steps(delta_f.const_data_ptr<float>() + start, delta_bias ? bias_f.const_data_ptr<float>()[d] : 0.f,
                 delta_softplus, step, slope);
      for (int64_t t = 0; t < shape.length; ++t) {
        dresult[t] = dout_f.const_data_ptr<float>()[start + t];
        if (z) {
          const float gate = z_f.const_data_ptr<float>()[start + t], open = sigmoid(gate);
          const float ungated = ungated_f.const_data_ptr<float>()[start + t];
          dz_f.data_ptr<float>()[start + t] = dresult[t] * ungated * open * (1.f + gate * (1.f - open));
          if (recompute_out_z) gated_f.data_ptr<float>()[start + t] = ungated * gate * open;
          dresult[t] *= gate * open;
        }
        dinput[t] = skip * dresult[t];
        dskip_f.data_ptr<float>()[d] += dresult[t] * input[t];
        dstep[t] = 0.f;
      }
      for (int64_t n = 0; n < shape.states; ++n) {
        const float rate = a_f.const_data_ptr<float>()[d * shape.states + n];
        const int64_t b_offset = projection_offset(shape.variable_b, shape, b, d, n);
        const int64_t c_offset = projection_offset(shape.variable_c, shape, b, d, n);
        const float* in = b_f.const_data_ptr<float>() + b_offset;
        const float* project = c_f.const_data_ptr<float>() + c_offset;
        float* din = db_f.data_ptr<float>() + b_offset;
        float* dproject = dc_f.data_ptr<float>() + c_offset;
        float state = 0.f;
        for (int64_t t = 0; t < shape.length; ++t) {
          decay[t] = std::exp(step[t] * rate);
          state = decay[t] * state + step[t] * in[shape.variable_b ? t : 0] * input[t];
          states[t] = state;
        }
        float dstate = 0.f, drate = 0.f;  // dstate: of the state at t, from its output and from all later positions
        for (int64_t t = shape.length - 1; t >= 0; --t) {
          const int64_t at_b = shape.variable_b ? t : 0, at_c = shape.variable_c ? t : 0;
          dstate = dresult[t] * project[at_c] + (t + 1 < shape.length ? decay[t + 1] * dstate : 0.f);
          const float carried = t > 0 ? decay[t] * states[t - 1] : 0.f;
          drate += dstate * carried * step[t];
          dstep[t] += dstate * (carried * rate + in[at_b] * input[t]);
          dinput[t] += dstate * step[t] * in[at_b];
          din[at_b] += dstate * step[t] * input[t];
          dproject[at_c] += dresult[t] * states[t];
        }
        da_f.data_ptr<float>()[d * shape.states + n] += drate;
      }
      for (int64_t t = 0; t < shape.length; ++t) {
        const float ddelta = dstep[t] * slope[t];
        ddelta_f.data_ptr<float>()[start + t] = ddelta;
        dbias_f.data_ptr<float>()[d] += ddelta;
      }
    }
  }
  // A tensor that was not asked for is undefined: Python sees None, as with upstream.
  std::vector<at::Tensor> results = {like(u, du_f), like(delta, ddelta_f), like(A, da_f), like(B, db_f), like(C, dc_f)};
  results.push_back(D ? dskip_f : at::Tensor());
  results.push_back(delta_bias ? dbias_f : at::Tensor());
  if (z) {
    dz_out.copy_(dz_f);
    results.push_back(dz_out);
  }
  if (recompute_out_z) results.push_back(z ? like(*out, gated_f) : at::Tensor());
  return results;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("fwd", &selective_scan_fwd, "Selective scan forward");
  m.def("bwd", &selective_scan_bwd, "Selective scan backward");
}
