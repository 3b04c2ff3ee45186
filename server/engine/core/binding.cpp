// Python's view of the core. Shapes and dtypes are checked here once; the GIL is released around all work.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "core.h"
#include "lookup.h"
#include "lora.h"
#include "repack.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sterna;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IntsOut = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntsOut2 = nb::ndarray<int32_t, nb::shape<-1, 20>, nb::c_contig, nb::device::cpu>;
using FloatsOut2 = nb::ndarray<float, nb::shape<-1, 20>, nb::c_contig, nb::device::cpu>;
using Flags = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

const Kernels* kernels_or_throw(const std::string& isa) {
  const Kernels* k = find_kernels(isa.c_str());
  if (!k) throw std::invalid_argument(std::string("this CPU has no kernels named ").append(isa));
  return k;
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> new_floats(size_t rows, size_t cols) {
  float* data = new float[rows * cols]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {data, {rows, cols}, owner};
}

// One packed matrix on its own: the kernels' door for tests and benchmarks.
struct Matrix {
  Arena arena;
  PackedMatrix packed;

  Matrix(int ggml_type, Bytes data, int rows, int cols, std::optional<Ints> row_map) {
    require(!row_map || row_map->size() == static_cast<size_t>(rows), "row_map must have one entry a row");
    ThreadTeam alone(1);
    packed = Model::pack(arena, alone, ggml_type, data.data(), data.size(), rows, cols,
                         row_map ? row_map->data() : nullptr);
  }
};

nb::ndarray<nb::numpy, float, nb::ndim<2>> unpack(const Matrix& m) {
  auto out = new_floats(static_cast<size_t>(m.packed.rows), static_cast<size_t>(m.packed.cols));
  for (int r = 0; r < m.packed.rows; ++r) unpack_row(m.packed, r, out.data() + static_cast<int64_t>(r) * m.packed.cols);
  return out;
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> matmul_once(const Matrix& m, Floats2 x, const std::string& isa, int group,
                                                       int repeat) {
  const Kernels* k = kernels_or_throw(isa);
  const PackedMatrix& w = m.packed;
  const int rows = static_cast<int>(x.shape(0));
  require(x.shape(1) == static_cast<size_t>(w.cols), "x must have the matrix's columns");
  require(group == 1 || group == 4 || group == 8, "group must be 1, 4 or 8");
  require(group <= k->max_group, "group is above what this ISA takes");
  auto padded = new_floats(static_cast<size_t>(rows), static_cast<size_t>(w.panels) * kPanel);
  const int64_t stride = static_cast<int64_t>(w.panels) * kPanel;
  std::vector<ActBlock> q(static_cast<size_t>((rows + 7) / 8 * 8) * static_cast<size_t>(w.cols / kBlock + 1));
  {
    nb::gil_scoped_release release;
    for (int i = 0; i < repeat; ++i) {
      if (is_float(w.format)) {
        k->matmul_float(w, x.data(), w.cols, nullptr, 0, rows, 0, w.panels, padded.data(), stride, false);
      } else {
        if (i == 0) k->quantize_rows(x.data(), w.cols, 0, rows, w.cols, group, false, q.data());
        k->matmul(w, q.data(), group, 0, rows, 0, w.panels, padded.data(), stride, false);
      }
    }
  }
  return padded;
}

int64_t probe_dot(const std::string& isa, int64_t rounds) {
  const Kernels* k = kernels_or_throw(isa);
  int32_t checksum = 0;
  nb::gil_scoped_release release;
  return k->probe_dot(rounds, &checksum);
}

uint64_t probe_read(Bytes data, const std::string& isa, int repeat) {
  const Kernels* k = kernels_or_throw(isa);
  require(reinterpret_cast<uintptr_t>(data.data()) % alignof(uint64_t) == 0, "data must be aligned to 8 bytes");
  uint64_t sum = 0;
  nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) {
    sum += k->probe_read(reinterpret_cast<const uint64_t*>(data.data()), static_cast<int64_t>(data.size() / 8));
  }
  return sum;
}

nb::tuple quantize_once(Floats2 x, const std::string& isa, bool one_scale) {
  const Kernels* k = kernels_or_throw(isa);
  const size_t rows = x.shape(0), cols = x.shape(1), blocks = cols / kBlock;
  require(cols % kBlock == 0, "columns must be a multiple of 32");
  std::vector<ActBlock> q(rows * blocks);
  k->quantize_rows(x.data(), static_cast<int64_t>(cols), 0, static_cast<int>(rows), static_cast<int>(cols), 1, one_scale,
                   q.data());
  auto values = new_floats(rows, cols);
  auto scales = new_floats(rows, blocks);
  for (size_t i = 0; i < q.size(); ++i) {
    for (size_t j = 0; j < kBlock; ++j) values.data()[i * kBlock + j] = static_cast<float>(q[i].q[j]);
    scales.data()[i] = q[i].d;
  }
  return nb::make_tuple(values, scales);
}

void model_add_matrix(Model& m, const std::string& name, int layer, int ggml_type, Bytes data, int rows, int cols,
                      std::optional<Ints> row_map) {
  require(!row_map || row_map->size() == static_cast<size_t>(rows), "row_map must have one entry a row");
  nb::gil_scoped_release release;
  m.add_matrix(name, layer, ggml_type, data.data(), data.size(), rows, cols, row_map ? row_map->data() : nullptr);
}

Batch batch_of(Ints token_ids, Ints seq_starts, Ints seq_positions, Ints2 block_tables, Ints lora_slots, Ints logit_rows) {
  const size_t seqs = seq_positions.size();
  require(seq_starts.size() == seqs + 1 && block_tables.shape(0) == seqs && lora_slots.size() == seqs,
          "seq_starts, block_tables and lora_slots must fit seq_positions");
  return {token_ids.data(), static_cast<int>(token_ids.size()), seq_starts.data(), seq_positions.data(),
          static_cast<int>(seqs), block_tables.data(), static_cast<int>(block_tables.shape(1)), lora_slots.data(),
          logit_rows.data(), static_cast<int>(logit_rows.size())};
}

struct SampleArgs {
  Ints slots, positions, targets, drafts, num_top;
  Flags use_mask;
  IntsOut tokens;
  FloatsOut logprobs;
  IntsOut2 top_ids;
  FloatsOut2 top_logprobs;
  void check() const {
    const size_t n = slots.size();
    require(positions.size() == n && targets.size() == n && drafts.size() == n && num_top.size() == n &&
                use_mask.size() == n && tokens.size() >= n && logprobs.size() >= n && top_ids.shape(0) >= n && top_logprobs.shape(0) >= n,
            "the arrays of sample() differ in length");
  }
  void run(Core& core) const {
    core.sample(static_cast<int>(slots.size()), slots.data(), positions.data(), targets.data(), drafts.data(),
                num_top.data(), use_mask.data(), tokens.data(), logprobs.data(), top_ids.data(), top_logprobs.data());
  }
};

void core_forward(Core& core, Ints token_ids, Ints seq_starts, Ints seq_positions, Ints2 block_tables, Ints lora_slots,
                  Ints logit_rows) {
  const Batch batch = batch_of(token_ids, seq_starts, seq_positions, block_tables, lora_slots, logit_rows);
  nb::gil_scoped_release release;
  core.forward(batch);
}

void core_sample(Core& core, Ints slots, Ints positions, Ints targets, Ints drafts, Ints num_top, Flags use_mask,
                 IntsOut tokens, FloatsOut logprobs, IntsOut2 top_ids, FloatsOut2 top_logprobs) {
  const SampleArgs args{slots, positions, targets, drafts, num_top, use_mask, tokens, logprobs, top_ids, top_logprobs};
  args.check();
  nb::gil_scoped_release release;
  args.run(core);
}

void core_step(Core& core, Ints token_ids, Ints seq_starts, Ints seq_positions, Ints2 block_tables, Ints lora_slots,
               Ints logit_rows, Ints slots, Ints positions, Ints targets, Ints drafts, Ints num_top, Flags use_mask,
               IntsOut tokens, FloatsOut logprobs, IntsOut2 top_ids, FloatsOut2 top_logprobs) {
  const Batch batch = batch_of(token_ids, seq_starts, seq_positions, block_tables, lora_slots, logit_rows);
  const SampleArgs args{slots, positions, targets, drafts, num_top, use_mask, tokens, logprobs, top_ids, top_logprobs};
  args.check();
  require(slots.size() == logit_rows.size(), "one slot a logit row");
  nb::gil_scoped_release release;
  core.forward(batch);
  args.run(core);
}

void core_set_sequence(Core& core, int slot, Ints prompt_ids, Ints output_ids, float temperature, int top_k, float top_p,
                       float min_p, float repetition_penalty, float presence_penalty, float frequency_penalty,
                       uint64_t seed, uint32_t choice, Ints bias_ids, Floats bias_values, Ints blocked_ids,
                       int block_until) {
  const int vocab = core.model().shape().vocab;
  require(bias_ids.size() == bias_values.size(), "bias_ids and bias_values differ in length");
  const auto in_vocab = [&](const Ints& ids) {
    for (size_t i = 0; i < ids.size(); ++i) require(ids.data()[i] >= 0 && ids.data()[i] < vocab, "token id out of range");
  };
  for (const Ints& ids : {prompt_ids, output_ids, bias_ids, blocked_ids}) in_vocab(ids);
  SamplingState& s = core.sequence(slot);
  nb::gil_scoped_release release;
  s.temperature = temperature;
  s.top_k = top_k;
  s.top_p = top_p;
  s.min_p = min_p;
  s.repetition_penalty = repetition_penalty;
  s.presence_penalty = presence_penalty;
  s.frequency_penalty = frequency_penalty;
  s.seed = seed;
  s.choice = choice;
  s.bias_ids.assign(bias_ids.data(), bias_ids.data() + bias_ids.size());
  s.bias_values.assign(bias_values.data(), bias_values.data() + bias_values.size());
  s.blocked_ids.assign(blocked_ids.data(), blocked_ids.data() + blocked_ids.size());
  s.block_until = block_until;
  s.set_history(prompt_ids.data(), static_cast<int>(prompt_ids.size()), output_ids.data(),
                static_cast<int>(output_ids.size()), vocab);
}

void lora_add(Lora& lora, int layer, const std::string& projection, Floats2 a, Floats2 b, float scale) {
  require(a.shape(0) == b.shape(1), "a and b differ in rank");
  nb::gil_scoped_release release;
  lora.add(layer, projection, a.data(), b.data(), static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)),
           static_cast<int>(b.shape(0)), scale);
}

nb::list available_isas() {
  nb::list out;
  for (const char* isa : {"avx512", "avx2", "scalar"})
    if (find_kernels(isa)) out.append(isa);
  return out;
}

std::pair<int, int> match_once(Ints tokens, int min_length, int max_length) {
  const Match match = find_match(tokens.data(), static_cast<int>(tokens.size()), min_length, max_length);
  return {match.at, match.length};
}

void bind_matrix(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::init<int, Bytes, int, int, std::optional<Ints>>(), "ggml_type"_a, "data"_a, "rows"_a, "cols"_a,
           "row_map"_a = nb::none())
      .def("to_float", &unpack)
      .def("matmul", &matmul_once, "x"_a, "isa"_a = "auto", "group"_a = 1, "repeat"_a = 1);
  m.def("quantize_activations", &quantize_once, "x"_a, "isa"_a = "auto", "one_scale"_a = false);
  m.def("probe_dot", &probe_dot, "isa"_a, "rounds"_a);
  m.def("probe_read", &probe_read, "data"_a, "isa"_a, "repeat"_a = 1);
  m.def("uniform", &philox_uniform, "seed"_a, "choice"_a, "position"_a);
  m.def("find_match", &match_once, "tokens"_a, "min_length"_a, "max_length"_a);
  m.def("available_isas", &available_isas);
}

void bind_model(nb::module_& m) {
  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, int num_layers, int hidden, int ffn, int num_heads, int num_kv_heads, int head_dim, int vocab,
             int rope_dim, int max_positions, float rms_norm_eps, float rope_theta, std::vector<float> rope_factors,
             bool squared_relu, bool row_scales, bool two_streams, const std::string& isa, int num_threads) {
            require(num_threads >= 1 && num_threads <= 256, "num_threads must be between 1 and 256");
            new (self) Model({num_layers, hidden, ffn, num_heads, num_kv_heads, head_dim, vocab, rope_dim, max_positions,
                              rms_norm_eps, rope_theta, std::move(rope_factors), squared_relu, row_scales, two_streams},
                             kernels_or_throw(isa), num_threads);
          },
          nb::kw_only(), "num_layers"_a, "hidden"_a, "ffn"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "vocab"_a,
          "rope_dim"_a, "max_positions"_a, "rms_norm_eps"_a, "rope_theta"_a, "rope_factors"_a,
          "squared_relu"_a, "row_scales"_a, "two_streams"_a, "isa"_a, "num_threads"_a)
      .def("add_matrix", &model_add_matrix, "name"_a, "layer"_a, "ggml_type"_a, "data"_a, "rows"_a, "cols"_a,
           "row_map"_a = nb::none())
      .def("add_vector",
           [](Model& self, const std::string& name, int layer, Floats data) {
             self.add_vector(name, layer, data.data(), static_cast<int>(data.size()));
           })
      .def("finish", &Model::finish)
      .def_prop_ro("isa", [](const Model& self) { return self.kernels().name; })
      .def_prop_ro("num_threads", [](Model& self) { return self.team().size(); })
      .def_prop_ro("weight_bytes", &Model::weight_bytes);
}

void bind_core(nb::module_& m) {
  nb::class_<Core>(m, "Core")
      .def(
          "__init__",
          [](Core* self, std::shared_ptr<Model> model, int num_blocks, int max_num_seqs, int max_batch_tokens,
             int max_logit_rows, int max_loras) {
            require(num_blocks > 0 && max_num_seqs > 0 && max_batch_tokens > 0 && max_logit_rows > 0 && max_loras >= 0,
                    "the limits must be positive");
            new (self) Core(std::move(model), {num_blocks, max_num_seqs, max_batch_tokens, max_logit_rows, max_loras});
          },
          "model"_a, nb::kw_only(), "num_blocks"_a, "max_num_seqs"_a, "max_batch_tokens"_a, "max_logit_rows"_a,
          "max_loras"_a)
      .def_prop_ro("vocab_size", [](Core& c) { return c.model().shape().vocab; })
      .def_prop_ro("mask_words", &Core::mask_words)
      .def_prop_ro("block_size", [](Core&) { return kKvBlock; })
      .def_prop_ro("num_blocks", [](Core& c) { return c.limits().num_blocks; })
      .def_prop_ro("max_num_seqs", [](Core& c) { return c.limits().max_num_seqs; })
      .def_prop_ro("max_batch_tokens", [](Core& c) { return c.limits().max_batch_tokens; })
      .def_prop_ro("max_logit_rows", [](Core& c) { return c.limits().max_logit_rows; })
      .def_prop_ro("max_loras", [](Core& c) { return c.limits().max_loras; })
      .def_prop_ro(
          "masks",
          [](Core& c) {
            return nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>(
                c.masks(), {static_cast<size_t>(c.limits().max_logit_rows), static_cast<size_t>(c.mask_words())}, nb::find(&c));
          },
          nb::rv_policy::reference_internal)
      .def("logits",
           [](Core& c, int rows) {  // a copy, for tests and perplexity
             const int vocab = c.model().shape().vocab;
             require(rows >= 0 && rows <= c.limits().max_logit_rows, "too many rows");
             auto out = new_floats(static_cast<size_t>(rows), static_cast<size_t>(vocab));
             for (int r = 0; r < rows; ++r)
               std::copy_n(c.logits() + r * c.logit_stride(), vocab, out.data() + static_cast<int64_t>(r) * vocab);
             return out;
           })
      .def("set_sequence", &core_set_sequence, "slot"_a, "prompt_ids"_a, "output_ids"_a, "temperature"_a, "top_k"_a,
           "top_p"_a, "min_p"_a, "repetition_penalty"_a, "presence_penalty"_a, "frequency_penalty"_a, "seed"_a,
           "choice"_a, "bias_ids"_a, "bias_values"_a, "blocked_ids"_a, "block_until"_a)
      // No conversions: a converted output array would be written and thrown away.
      .def("forward", &core_forward, "token_ids"_a.noconvert(), "seq_starts"_a.noconvert(), "seq_positions"_a.noconvert(), "block_tables"_a.noconvert(), "lora_slots"_a.noconvert(),
           "logit_rows"_a.noconvert())
      .def("sample", &core_sample, "slots"_a.noconvert(), "positions"_a.noconvert(), "targets"_a.noconvert(), "drafts"_a.noconvert(), "num_top"_a.noconvert(), "use_mask"_a.noconvert(), "out_tokens"_a.noconvert(),
           "out_logprobs"_a.noconvert(), "out_top_ids"_a.noconvert(), "out_top_logprobs"_a.noconvert())
      .def("step", &core_step, "token_ids"_a.noconvert(), "seq_starts"_a.noconvert(), "seq_positions"_a.noconvert(), "block_tables"_a.noconvert(), "lora_slots"_a.noconvert(),
           "logit_rows"_a.noconvert(), "slots"_a.noconvert(), "positions"_a.noconvert(), "targets"_a.noconvert(), "drafts"_a.noconvert(), "num_top"_a.noconvert(), "use_mask"_a.noconvert(), "out_tokens"_a.noconvert(),
           "out_logprobs"_a.noconvert(), "out_top_ids"_a.noconvert(), "out_top_logprobs"_a.noconvert())
      .def("profile",  // seconds by op since the last call
           [](Core& c, bool is_on, bool own_clock) {
             const Profile::Seconds seconds = c.profile().restart(is_on, own_clock);
             nb::dict out;
             for (size_t i = 0; i < seconds.size(); ++i) out[kOpNames[i]] = seconds[i];
             return out;
           },
           "is_on"_a, "own_clock"_a = false)
      .def("new_lora", [](Core& c) { return std::make_shared<Lora>(c.shared_model()); })
      .def("set_lora", &Core::set_lora, "lora_slot"_a, "lora"_a)
      .def("clear_lora", [](Core& c, int slot) { c.set_lora(slot, nullptr); }, "lora_slot"_a);
  nb::class_<Lora>(m, "Lora")
      .def("add", &lora_add, "layer_index"_a, "projection"_a, "a"_a, "b"_a, "scale"_a)
      .def_prop_ro("num_bytes", &Lora::bytes);
}

}  // namespace

NB_MODULE(_sterna, m) {
  // Objects that a frozen collector still holds at exit are freed with the process; nanobind would print 30 lines.
  nb::set_leak_warnings(false);
  m.doc() = "Sterna's hot core: packed weights, kernels, forward pass and sampler.";
  bind_matrix(m);
  bind_model(m);
  bind_core(m);
}
