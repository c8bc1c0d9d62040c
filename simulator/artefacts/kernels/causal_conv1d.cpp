// causal_conv1d_cuda for CPU tensors: the call signatures, argument checks and results of causal_conv1d 1.6.0,
// without a GPU. Everything is computed in float32 on plain buffers and rounded once when it is stored, as a CUDA
// kernel does. It runs below autograd, so the backward pass is written out.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_device(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor: this build of causal_conv1d_cuda has no GPU code");
}

void check_dtype(const at::Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name,
              " must be float32, float16 or bfloat16, not ", toString(type));
}

void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", not ", tensor.sizes());
}

// A contiguous float32 copy that shares no memory with the argument: outputs may alias inputs.
at::Tensor as_float(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous))
      .copy_(tensor);
}

at::Tensor float_buffer(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions().dtype(at::kFloat)).zero_();
}

float sigmoid(float value) { return 1.f / (1.f + std::exp(-value)); }

struct Shape {
  int64_t batch, dim, length, width;
  bool channel_last;
};

// What forward and backward ask of x, weight, bias and seq_idx.
Shape check_inputs(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& seq_idx) {
  check_dtype(x, "x");
  check_dtype(weight, "weight");
  check_device(x, "x");
  check_device(weight, "weight");
  TORCH_CHECK(x.dim() == 3, "x must have shape (batch, dim, seqlen), not ", x.sizes());
  TORCH_CHECK(weight.dim() == 2, "weight must have shape (dim, width), not ", weight.sizes());
  Shape shape{x.size(0), x.size(1), x.size(2), weight.size(1), false};
  check_shape(weight, {shape.dim, shape.width}, "weight");
  TORCH_CHECK(shape.width >= 2 && shape.width <= 4, "causal_conv1d only supports width between 2 and 4");
  TORCH_CHECK(x.stride(2) == 1 || x.stride(1) == 1, "x must be contiguous along its length or its channels");
  shape.channel_last = x.stride(1) == 1 && x.stride(2) > 1;
  if (shape.channel_last) {
    TORCH_CHECK(shape.dim % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now");
    TORCH_CHECK(x.stride(2) % 8 == 0 && x.stride(0) % 8 == 0,
                "causal_conv1d with channel last layout requires strides (x.stride(0) and x.stride(2)) to be "
                "multiples of 8");
  }
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "bias must have the dtype of weight");
    check_device(*bias, "bias");
    check_shape(*bias, {shape.dim}, "bias");
    TORCH_CHECK(bias->stride(-1) == 1, "bias must be contiguous");
  }
  if (seq_idx) {
    TORCH_CHECK(shape.channel_last, "seq_idx is only supported for channel last layout");
    TORCH_CHECK(seq_idx->scalar_type() == at::kInt, "seq_idx must be int32");
    check_device(*seq_idx, "seq_idx");
    TORCH_CHECK(seq_idx->is_contiguous(), "seq_idx must be contiguous");
    check_shape(*seq_idx, {shape.batch, shape.length}, "seq_idx");
  }
  return shape;
}

void check_states(const at::Tensor& states, const at::Tensor& x, const Shape& shape, const char* name) {
  TORCH_CHECK(shape.channel_last, name, " is only supported for channel last layout");
  TORCH_CHECK(states.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_device(states, name);
  check_shape(states, {shape.batch, shape.dim, shape.width - 1}, name);
}

// One channel's input with the width - 1 values before its first one (initial states or zeros) in front.
void load_row(std::vector<float>& row, const float* x, const float* initial, const Shape& shape) {
  const int64_t before = shape.width - 1;
  for (int64_t i = 0; i < before; ++i) row[i] = initial ? initial[i] : 0.f;
  for (int64_t i = 0; i < shape.length; ++i) row[before + i] = x[i];
}

// Whether the tap that reads position `from` (negative: before the sequence) counts for the output at `at`.
bool same_sequence(const int32_t* seq, int64_t at, int64_t from) {
  if (!seq) return true;
  return from >= 0 && seq[from] == seq[at];
}

bool is_padding(const int32_t* seq, int64_t at) { return seq && seq[at] < 0; }

void causal_conv1d_fwd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states, at::Tensor& out,
                       OptionalTensor& final_states_out, bool silu_activation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Shape shape = check_inputs(x, weight, bias, seq_idx);
  const int64_t before = shape.width - 1;
  check_device(out, "out");
  check_shape(out, {shape.batch, shape.dim, shape.length}, "out");
  if (initial_states) {
    check_states(*initial_states, x, shape, "initial_states");
    TORCH_CHECK(initial_states->stride(1) == 1, "initial_states must be contiguous along its channels");
  }
  if (final_states_out) {
    check_states(*final_states_out, x, shape, "final_states");
    TORCH_CHECK(final_states_out->stride(1) == 1, "final_states must be contiguous along its channels");
  }
  const at::Tensor x_f = as_float(x), weight_f = as_float(weight);
  const at::Tensor bias_f = bias ? as_float(*bias) : at::Tensor();
  const at::Tensor initial_f = initial_states ? as_float(*initial_states) : at::Tensor();
  at::Tensor out_f = float_buffer({shape.batch, shape.dim, shape.length});
  at::Tensor final_f = float_buffer({shape.batch, shape.dim, before});
  std::vector<float> row(before + shape.length);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int32_t* seq = seq_idx ? seq_idx->const_data_ptr<int32_t>() + b * shape.length : nullptr;
    for (int64_t d = 0; d < shape.dim; ++d) {
      const int64_t channel = b * shape.dim + d;
      const float* taps = weight_f.const_data_ptr<float>() + d * shape.width;
      const float offset = bias ? bias_f.const_data_ptr<float>()[d] : 0.f;
      float* result = out_f.data_ptr<float>() + channel * shape.length;
      load_row(row, x_f.const_data_ptr<float>() + channel * shape.length,
               initial_states ? initial_f.const_data_ptr<float>() + channel * before : nullptr, shape);
      for (int64_t t = 0; t < shape.length; ++t) {
        if (is_padding(seq, t)) continue;
        float value = offset;
        for (int64_t w = 0; w < shape.width; ++w)
          if (same_sequence(seq, t, t + w - before)) value += taps[w] * row[t + w];
        result[t] = silu_activation ? value * sigmoid(value) : value;
      }
      for (int64_t i = 0; i < before; ++i)
        final_f.data_ptr<float>()[channel * before + i] = row[shape.length + i];
    }
  }
  out.copy_(out_f);
  if (final_states_out) final_states_out->copy_(final_f);
}

// Writes dx and dinitial_states; adds to dweight and dbias, which the caller has zeroed.
void causal_conv1d_bwd(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, at::Tensor& dout,
                       const OptionalTensor& seq_idx, const OptionalTensor& initial_states,
                       const OptionalTensor& dfinal_states, at::Tensor& dx, at::Tensor& dweight,
                       OptionalTensor& dbias, OptionalTensor& dinitial_states, bool silu_activation) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(bias.has_value() == dbias.has_value(), "dbias must be given exactly when bias is");
  const Shape shape = check_inputs(x, weight, bias, seq_idx);
  const int64_t before = shape.width - 1;
  check_device(dout, "dout");
  check_shape(dout, {shape.batch, shape.dim, shape.length}, "dout");
  TORCH_CHECK(dout.scalar_type() == x.scalar_type(), "dout must have the dtype of x");
  TORCH_CHECK(dx.scalar_type() == x.scalar_type(), "dx must have the dtype of x");
  check_device(dx, "dx");
  check_shape(dx, {shape.batch, shape.dim, shape.length}, "dx");
  TORCH_CHECK(dx.stride(shape.channel_last ? 1 : 2) == 1, "dx must have the layout of x");
  check_device(dweight, "dweight");
  check_shape(dweight, {shape.dim, shape.width}, "dweight");
  TORCH_CHECK(dweight.scalar_type() == at::kFloat, "dweight must be float32");
  if (dbias) {
    check_device(*dbias, "dbias");
    check_shape(*dbias, {shape.dim}, "dbias");
    TORCH_CHECK(dbias->scalar_type() == at::kFloat, "dbias must be float32");
  }
  if (initial_states) {
    check_states(*initial_states, x, shape, "initial_states");
    TORCH_CHECK(initial_states->stride(1) == 1, "initial_states must be contiguous along its channels");
  }
  if (dfinal_states) check_states(*dfinal_states, x, shape, "dfinal_states");
  if (dinitial_states) {
    check_device(*dinitial_states, "dinitial_states");
    check_shape(*dinitial_states, {shape.batch, shape.dim, before}, "dinitial_states");
    TORCH_CHECK(dinitial_states->stride(1) == 1, "dinitial_states must be contiguous along its channels");
  }
  const at::Tensor x_f = as_float(x), weight_f = as_float(weight), dout_f = as_float(dout);
  const at::Tensor bias_f = bias ? as_float(*bias) : at::Tensor();
  const at::Tensor initial_f = initial_states ? as_float(*initial_states) : at::Tensor();
  const at::Tensor dfinal_f = dfinal_states ? as_float(*dfinal_states) : at::Tensor();
  at::Tensor dx_f = float_buffer({shape.batch, shape.dim, shape.length});
  at::Tensor dinitial_f = float_buffer({shape.batch, shape.dim, before});
  at::Tensor dweight_f = float_buffer({shape.dim, shape.width});
  at::Tensor dbias_f = float_buffer({shape.dim});
  std::vector<float> row(before + shape.length), drow(before + shape.length);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int32_t* seq = seq_idx ? seq_idx->const_data_ptr<int32_t>() + b * shape.length : nullptr;
    for (int64_t d = 0; d < shape.dim; ++d) {
      const int64_t channel = b * shape.dim + d;
      const float* taps = weight_f.const_data_ptr<float>() + d * shape.width;
      const float* upstream = dout_f.const_data_ptr<float>() + channel * shape.length;
      float* dtaps = dweight_f.data_ptr<float>() + d * shape.width;
      const float offset = bias ? bias_f.const_data_ptr<float>()[d] : 0.f;
      load_row(row, x_f.const_data_ptr<float>() + channel * shape.length,
               initial_states ? initial_f.const_data_ptr<float>() + channel * before : nullptr, shape);
      for (float& value : drow) value = 0.f;
      for (int64_t t = 0; t < shape.length; ++t) {
        if (is_padding(seq, t)) continue;
        float gradient = upstream[t];
        if (silu_activation) {
          float value = offset;
          for (int64_t w = 0; w < shape.width; ++w)
            if (same_sequence(seq, t, t + w - before)) value += taps[w] * row[t + w];
          const float gate = sigmoid(value);
          gradient *= gate * (1.f + value * (1.f - gate));
        }
        dbias_f.data_ptr<float>()[d] += gradient;
        for (int64_t w = 0; w < shape.width; ++w) {
          if (!same_sequence(seq, t, t + w - before)) continue;
          dtaps[w] += gradient * row[t + w];
          drow[t + w] += gradient * taps[w];
        }
      }
      if (dfinal_states)
        for (int64_t i = 0; i < before; ++i)
          drow[shape.length + i] += dfinal_f.const_data_ptr<float>()[channel * before + i];
      for (int64_t t = 0; t < shape.length; ++t)
        dx_f.data_ptr<float>()[channel * shape.length + t] = drow[before + t];
      for (int64_t i = 0; i < before; ++i) dinitial_f.data_ptr<float>()[channel * before + i] = drow[i];
    }
  }
  dx.copy_(dx_f);
  dweight.add_(dweight_f);
  if (dbias) dbias->add_(dbias_f);
  if (dinitial_states) dinitial_states->copy_(dinitial_f);
}

// A step of decoding: reads and advances conv_state, which is a circular buffer when cache_seqlens is given.
void causal_conv1d_update(const at::Tensor& x, const at::Tensor& conv_state, const at::Tensor& weight,
                          const OptionalTensor& bias, at::Tensor& out, bool silu_activation,
                          const OptionalTensor& cache_seqlens, const OptionalTensor& conv_state_indices) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_dtype(x, "x");
  check_dtype(weight, "weight");
  TORCH_CHECK(conv_state.scalar_type() == x.scalar_type(), "conv_state must have the dtype of x");
  check_device(x, "x");
  check_device(conv_state, "conv_state");
  check_device(weight, "weight");
  check_device(out, "out");
  TORCH_CHECK(x.dim() == 3, "x must have shape (batch, dim, seqlen), not ", x.sizes());
  TORCH_CHECK(conv_state.dim() == 3, "conv_state must have shape (batch, dim, state_len), not ", conv_state.sizes());
  TORCH_CHECK(weight.dim() == 2, "weight must have shape (dim, width), not ", weight.sizes());
  const int64_t batch = x.size(0), dim = x.size(1), length = x.size(2), width = weight.size(1);
  const int64_t entries = conv_state.size(0), state_length = conv_state.size(2), before = width - 1;
  TORCH_CHECK(state_length >= before, "conv_state must hold at least width - 1 values a channel");
  check_shape(weight, {dim, width}, "weight");
  check_shape(out, {batch, dim, length}, "out");
  TORCH_CHECK(width >= 2 && width <= 4, "causal_conv1d only supports width between 2 and 4");
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == weight.scalar_type(), "bias must have the dtype of weight");
    check_device(*bias, "bias");
    check_shape(*bias, {dim}, "bias");
    TORCH_CHECK(bias->stride(-1) == 1, "bias must be contiguous");
  }
  if (conv_state_indices) {
    TORCH_CHECK(conv_state_indices->scalar_type() == at::kInt, "conv_state_indices must be int32");
    check_device(*conv_state_indices, "conv_state_indices");
    check_shape(*conv_state_indices, {batch}, "conv_state_indices");
    TORCH_CHECK(conv_state_indices->stride(0) == 1, "conv_state_indices must be contiguous");
    check_shape(conv_state, {entries, dim, state_length}, "conv_state");
  } else {
    check_shape(conv_state, {batch, dim, state_length}, "conv_state");
  }
  if (cache_seqlens) {
    TORCH_CHECK(cache_seqlens->scalar_type() == at::kInt, "cache_seqlens must be int32");
    check_device(*cache_seqlens, "cache_seqlens");
    check_shape(*cache_seqlens, {batch}, "cache_seqlens");
    TORCH_CHECK(cache_seqlens->stride(-1) == 1, "cache_seqlens must be contiguous");
  }
  const at::Tensor x_f = as_float(x), weight_f = as_float(weight);
  const at::Tensor bias_f = bias ? as_float(*bias) : at::Tensor();
  at::Tensor state_f = as_float(conv_state);
  at::Tensor out_f = float_buffer({batch, dim, length});
  std::vector<float> row(before + length), kept(state_length + length);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t entry = conv_state_indices ? conv_state_indices->const_data_ptr<int32_t>()[b] : b;
    if (entry < 0) continue;  // a padding token: its output is zero, no state moves
    TORCH_CHECK(entry < entries, "conv_state_indices names entry ", entry, " of ", entries);
    int64_t position = cache_seqlens ? cache_seqlens->const_data_ptr<int32_t>()[b] % state_length : 0;
    if (position < 0) position += state_length;
    for (int64_t d = 0; d < dim; ++d) {
      const float* input = x_f.const_data_ptr<float>() + (b * dim + d) * length;
      const float* taps = weight_f.const_data_ptr<float>() + d * width;
      const float offset = bias ? bias_f.const_data_ptr<float>()[d] : 0.f;
      float* state = state_f.data_ptr<float>() + (entry * dim + d) * state_length;
      float* result = out_f.data_ptr<float>() + (b * dim + d) * length;
      for (int64_t i = 0; i < before; ++i)
        row[i] = cache_seqlens ? state[(position - before + i + state_length) % state_length]
                               : state[state_length - before + i];
      for (int64_t t = 0; t < length; ++t) row[before + t] = input[t];
      if (cache_seqlens) {
        for (int64_t t = 0; t < length; ++t) state[(position + t) % state_length] = input[t];
      } else {
        for (int64_t i = 0; i < state_length; ++i) kept[i] = state[i];
        for (int64_t t = 0; t < length; ++t) kept[state_length + t] = input[t];
        for (int64_t i = 0; i < state_length; ++i) state[i] = kept[length + i];
      }
      for (int64_t t = 0; t < length; ++t) {
        float value = offset;
        for (int64_t w = 0; w < width; ++w) value += taps[w] * row[t + w];
        result[t] = silu_activation ? value * sigmoid(value) : value;
      }
    }
  }
  out.copy_(out_f);
  conv_state.copy_(state_f);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("causal_conv1d_fwd", &causal_conv1d_fwd, "Causal conv1d forward");
  m.def("causal_conv1d_bwd", &causal_conv1d_bwd, "Causal conv1d backward");
  m.def("causal_conv1d_update", &causal_conv1d_update, "Causal conv1d update");
}
