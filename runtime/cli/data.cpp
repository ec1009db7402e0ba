#include "runtime/workloads/data.hpp"

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "runtime/cli/command.hpp"

namespace orthrus::cli {

Run add_data(CLI::App& app) {
  app.description("data sets from installed packages or own files");
  app.require_subcommand(1);
  CLI::App* prepare = app.add_subcommand("prepare", "write token or image shards and a manifest");
  struct Given {
    std::vector<std::string> sources;
    std::string out;
  };
  const auto given = std::make_shared<Given>();
  prepare
      ->add_option("source", given->sources,
                   "kjv, gcide, fashion-mnist, digits, or text files (their bytes, in this order)")
      ->required();
  prepare->add_option("--out", given->out,
                      "directory to write; for a named data set, where `data.source: NAME` looks");

  return [given](Context& context) {
    // One process writes; the others have nothing to add.
    if (context.rank() != 0) return 0;
    std::filesystem::path out = given->out;
    if (out.empty()) {
      out = workloads::is_named_source(given->sources[0])
                ? workloads::named_directory(given->sources[0])
                : std::filesystem::path("data") / std::filesystem::path(given->sources[0]).stem();
    }
    const workloads::Prepared done = workloads::prepare_data(given->sources, out);
    const auto manifest = nlohmann::json::parse(done.manifest);
    if (context.json) {
      const nlohmann::json document{
          {"directory", done.directory.string()}, {"kept", done.kept}, {"manifest", manifest}};
      std::printf("%s\n", document.dump(2).c_str());
      return 0;
    }
    std::printf("%s: %s\n", done.directory.c_str(),
                done.kept ? "kept, it already holds exactly this" : "written");
    for (const auto& [split, count] : manifest["counts"].items()) {
      std::printf("  %-5s  %10lld %s\n", split.c_str(), count.get<long long>(),
                  manifest["kind"].get<std::string>().c_str());
    }
    for (const auto& shard : manifest["files"]) {
      std::printf("  %-22s %10lld bytes  sha256 %s\n", shard["file"].get<std::string>().c_str(),
                  shard["bytes"].get<long long>(), shard["sha256"].get<std::string>().c_str());
    }
    return 0;
  };
}

}  // namespace orthrus::cli
