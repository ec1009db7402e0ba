#pragma once
/// @file
/// Runs of a model on ranks that are threads: every step's report is checked against the plan, and
/// both against what really travelled.

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <mutex>
#include <orthrus/error.hpp>

#include "comm/core.hpp"
#include "comm/thread.hpp"
#include "modes_model.hpp"

namespace orthrus::modes {

// ---- what really travels -----------------------------------------------------------------------

/// A body that hands everything on to another, and remembers every communicator split from it: what
/// an optimizer's ranks copied from each other is then known, whatever communicators it made.
class Tap final : public CommunicatorBackend {
 public:
  struct Calls {
    std::vector<std::shared_ptr<Communicator>> all;
    std::function<void()> before_meeting;  ///< called before an all_to_all or a triangle's sum

    [[nodiscard]] Traffic copied() const {
      Traffic sum;
      for (const auto& c : all) sum += comm::thread_copied(*c);
      return sum;
    }
  };

  Tap(std::shared_ptr<Communicator> inner, std::shared_ptr<Calls> calls)
      : inner_(std::move(inner)), calls_(std::move(calls)) {
    calls_->all.push_back(inner_);
  }
  static Communicator on(Communicator inner, const std::shared_ptr<Calls>& calls) {
    const Communicator::Options options = inner.options();
    return {std::make_unique<Tap>(std::make_shared<Communicator>(std::move(inner)), calls),
            options};
  }

  int rank() const override { return body().rank(); }
  int size() const override { return body().size(); }
  const char* kind() const override { return body().kind(); }
  Done all_reduce(Span data, ReduceOp op) override {
    if (data.dtype == DType::f32) announce();
    return body().all_reduce(data, op);
  }
  Done reduce_scatter(ConstSpan send, std::span<const Index> counts, Span recv) override {
    announce();
    return body().reduce_scatter(send, counts, recv);
  }
  Done all_gather(ConstSpan send, std::span<const Index> counts, Span recv) override {
    return body().all_gather(send, counts, recv);
  }
  Done broadcast(Span data, int root) override { return body().broadcast(data, root); }
  Done reduce(ConstSpan send, Span recv, ReduceOp op, int root) override {
    return body().reduce(send, recv, op, root);
  }
  Done all_to_all(ConstSpan send, std::span<const Index> send_counts, Span recv,
                  std::span<const Index> recv_counts, Index limit) override {
    announce();
    return body().all_to_all(send, send_counts, recv, recv_counts, limit);
  }
  Done send(ConstSpan data, int to, int tag) override { return body().send(data, to, tag); }
  Done receive(Span data, int from, int tag) override { return body().receive(data, from, tag); }
  Done barrier() override { return body().barrier(); }
  std::unique_ptr<CommunicatorBackend> split(int color, int key) override {
    return child(body().split(color, key));
  }
  std::unique_ptr<CommunicatorBackend> duplicate() override { return child(body().duplicate()); }
  void set_blocking(bool blocking) override { body().set_blocking(blocking); }

 private:
  CommunicatorBackend& body() const { return comm::Core::body_of(*inner_); }
  std::unique_ptr<CommunicatorBackend> child(std::unique_ptr<CommunicatorBackend> part) {
    return std::make_unique<Tap>(std::make_shared<Communicator>(std::move(part)), calls_);
  }
  void announce() const {
    if (calls_->before_meeting) calls_->before_meeting();
  }

  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<Calls> calls_;
};

// ---- runs --------------------------------------------------------------------------------------

/// A run of the model's steps `first` … `last`.
struct Run {
  std::int64_t first = 1, last = 0;  ///< 0: as many as there are gradients
  std::string load = {}, save = {};
  Index max_chunk = 0x7fffffff;
};

struct Outcome {
  std::vector<std::vector<float>> weights;  ///< whole
  std::map<std::string, std::vector<float>> state;
  std::int64_t matrices = 0;                    ///< orthogonalized in the last step, by all ranks
  std::vector<std::vector<double>> update_rms;  ///< per step
};

inline void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  EXPECT_EQ(a.weights, b.weights) << what;
  ASSERT_EQ(a.state.size(), b.state.size()) << what;
  for (const auto& [name, values] : a.state) {
    ASSERT_TRUE(b.state.contains(name)) << what << ": " << name;
    EXPECT_EQ(values, b.state.at(name)) << what << ": " << name;
  }
}

/// The size of every step's update: summed in other orders, and so no more than near.
inline void expect_near_rms(const Outcome& a, const Outcome& b, const std::string& what) {
  ASSERT_EQ(a.update_rms.size(), b.update_rms.size()) << what;
  for (std::size_t s = 0; s < a.update_rms.size(); ++s) {
    for (std::size_t g = 0; g < a.update_rms[s].size(); ++g) {
      EXPECT_NEAR(a.update_rms[s][g], b.update_rms[s][g], 1e-9 * b.update_rms[s][g]) << what;
      EXPECT_GT(b.update_rms[s][g], 0) << what;
    }
  }
}

/// Checks one step's report against the plan, and both against what the ranks really copied.
inline void expect_as_planned(const StepReport& report, const runtime::RankPlan& plan,
                              Traffic copied) {
  EXPECT_FALSE(report.skipped) << report.skip_reason;
  const Traffic planned = plan.traffic_of(report.step);
  EXPECT_EQ(report.bytes_sent, planned.bytes) << "step " << report.step;
  EXPECT_EQ(report.messages, planned.messages) << "step " << report.step;
  EXPECT_EQ(copied.bytes, planned.bytes) << "step " << report.step;
  EXPECT_EQ(copied.messages, planned.messages) << "step " << report.step;
  EXPECT_EQ(report.matrices, plan.matrices_of(report.step)) << "step " << report.step;
  EXPECT_EQ(report.exceptional_bytes, 0);
}

/// Trains on threads; every step of every rank is checked as above.
class Job {
 public:
  Job(const Config& config, Communicator& comm, const std::vector<Parameter>& parameters,
      const Run& run)
      : calls_(std::make_shared<Tap::Calls>()),
        compares_replicas_(config.replica_hash_every > 0 || config.checks == "collective"),
        plan_(plan_of(config, parameters, comm.size(), run.max_chunk)),
        comm_(comm),
        optimizer(config, tapped(comm, run.max_chunk, calls_), parameters) {
    EXPECT_EQ(optimizer.plan_hash(), plan_.hash);
    EXPECT_EQ(optimizer.memory().total(), mine().memory.total());
    if (!run.load.empty()) optimizer.load(run.load);
    before_ = calls_->copied();
  }
  const runtime::RankPlan& mine() const {
    return plan_.per_rank[static_cast<std::size_t>(comm_.rank())];
  }
  void check(const StepReport& report) {
    const Traffic now = calls_->copied();
    // To compare replicas is no part of a step.
    const Traffic planned = mine().traffic_of(report.step);
    expect_as_planned(report, mine(), compares_replicas_ ? planned : now - before_);
    before_ = now;
  }
  void finish(const Run& run, const StepReport& last, Outcome& outcome) {
    std::array<std::int64_t, 1> matrices{last.matrices};
    comm_.all_reduce(std::span<std::int64_t>(matrices));
    auto state = optimizer.gather_state();
    if (comm_.rank() == 0) {
      outcome.matrices = matrices[0];
      for (auto& [name, tensor] : state) outcome.state[name] = std::move(tensor.values);
    }
    if (!run.save.empty()) optimizer.save(run.save);
    before_ = calls_->copied();
  }

 private:
  static Communicator tapped(Communicator& comm, Index max_chunk,
                             const std::shared_ptr<Tap::Calls>& calls) {
    Communicator job = comm.duplicate("job");
    job.set_max_chunk(max_chunk);
    return Tap::on(std::move(job), calls);
  }

  std::shared_ptr<Tap::Calls> calls_;
  bool compares_replicas_;
  runtime::Plan plan_;
  Communicator& comm_;
  Traffic before_;

 public:
  ShardedOptimizer optimizer;
};

inline Outcome train(const Config& config, const Model& model, int ranks, Run run = {}) {
  if (run.last == 0) run.last = std::ssize(model.gradients);
  Outcome outcome;
  outcome.weights = model.weights;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    const int shards = config.mesh.shard > 0       ? static_cast<int>(config.mesh.shard)
                       : config.mesh.replicate > 0 ? ranks / static_cast<int>(config.mesh.replicate)
                                                   : ranks;
    Trainer trainer(model, comm.rank() % shards, shards);
    Job job(config, comm, trainer.parameters, run);
    StepReport report;
    for (std::int64_t s = run.first; s <= run.last; ++s) {
      trainer.backward(s);
      report = job.optimizer.step();
      job.check(report);
      if (comm.rank() == 0) outcome.update_rms.push_back(report.update_rms);
    }
    job.finish(run, report, outcome);
    if (comm.rank() < shards) {
      static std::mutex writing;  // whole tensors are written by every rank that has them
      const std::lock_guard lock(writing);
      trainer.take(outcome.weights);
    }
    comm.barrier();
    EXPECT_EQ(trainer.different(outcome.weights), 0) << "on rank " << comm.rank();
  });
  return outcome;
}

/// The toy model, every rank with gradients of its own.
inline Outcome train_toy(const Config& config, int ranks, Run run = {}) {
  if (run.last == 0) run.last = 4;
  Outcome outcome;
  run_thread_ranks(ranks, [&](Communicator& comm) {
    toy::Model model;
    if (!run.load.empty()) {
      for (auto& w : model.weights) std::fill(w.begin(), w.end(), 99.0F);
    }
    Job job(config, comm, model.parameters, run);
    StepReport report;
    for (std::int64_t s = run.first; s <= run.last; ++s) {
      if (config.virtual_shards > 0) {
        report = toy::reproducible_step(job.optimizer, model, config.virtual_shards, s);
      } else {
        for (std::int64_t k = 0; k < config.train.micro_batches; ++k) {
          job.optimizer.micro_batch(k);
          model.backward(s, comm.rank() + 8 * k);
          for (int id = 0; id < std::ssize(model.parameters); ++id) {
            job.optimizer.gradient_ready(id);
          }
        }
        report = job.optimizer.step();
      }
      job.check(report);
      if (comm.rank() == 0) outcome.update_rms.push_back(report.update_rms);
    }
    if (comm.rank() == 0) outcome.weights = model.weights;
    comm.barrier();
    EXPECT_EQ(model.weights, outcome.weights) << "on rank " << comm.rank();
    job.finish(run, report, outcome);
  });
  return outcome;
}

/// Runs `f` and returns what it threw.
template <class E, class F>
std::string thrown(F&& f, ExitCode code = ExitCode::config) {
  try {
    f();
  } catch (const E& e) {
    EXPECT_EQ(e.exit_code(), code) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

inline void expect_says(const std::string& what, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(what.find(part), std::string::npos) << "no \"" << part << "\" in: " << what;
  }
}

inline std::string name_of_case(const testing::TestParamInfo<ModeCase>& info) {
  return label(info.param);
}

}  // namespace orthrus::modes
