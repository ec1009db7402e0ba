#pragma once
/// @file
/// The example of the contract (studies.md 6.2).

namespace orthrus::runner {

inline constexpr const char* example_study =
    R"yaml(orthrus_study: 1                 # schema version, mandatory
name: muon-cbs-resmlp
description: free text
task: {builtin: residual_mlp, d: 32, width: 64, blocks: 4}
search:
  method: grid
  metric: {name: val_loss, goal: minimize, target: 0.05}
  parameters:
    optimizer:   {values: [sgd, adamw, muon]}
    batch_size:  {log2: [4, 10]}                  # 16 … 1024
    lr:          {center: {rule: sqrt, at: {batch_size: 64}, per: optimizer,
                           value: {sgd: 0.1, adamw: 3.0e-3, muon: 2.0e-2}},
                  multipliers: {sqrt2: [-2, 2]},
                  extend_on_edge: 3}
    tau:         0.2
    seed:        {tune: [0, 1], report: [10, 11, 12]}
  zip: []
  exclude: ["optimizer == sgd && batch_size > 512"]
  derive:
    warmup_examples: "min(2000, 0.05*max_examples)"
    weight_decay: "batch_size/(lr*tau*max_examples)"
budget: {max_examples: 100000, max_steps: 20000, max_seconds: 600, run_cap: 500}
eval: {every_frac: 0.02, on: [raw, ema], ema_halflife_examples: 5000}
stop: {on_target: true, diverged: "loss > 10*loss0 || !isfinite(loss)"}
probes: {gns: {every: 50, geometry: [l2, nuc]}, advisor: report, budget_frac: 0.01}
execution:
  ranks_per_trial: 1
  max_parallel: auto
  mode: inprocess
  max_retries: 2
  heartbeat_s: 30
  order: longest_first
analysis:
  items:
    - {fit: hyper, per: [optimizer], definitions: [mccandlish, overhead20], b_ref: 64}
    - {fit: three_term, per: [optimizer]}
    - {fit: lr_exponent, per: [optimizer]}
    - {compare: token_ratio, numerator: adamw, denominator: muon}
  bootstrap: {resamples: 2000, kind: stratified, level: 0.95}
report: {formats: [html, json, csv, mllog], plots: default, pdf: if_available}
)yaml";

}  // namespace orthrus::runner
