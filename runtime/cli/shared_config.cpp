#include "runtime/cli/shared_config.hpp"

#include <orthrus/error.hpp>

#include "runtime/agree.hpp"

namespace orthrus::cli {

Config shared_config(const std::string& file, const std::vector<std::string>& overrides,
                     Communicator& comm) {
  Config config;
  std::string text;
  runtime::agree(comm, [&] {
    if (comm.rank() != 0) return;
    for (const std::string& entry : overrides) {
      if (entry.find('=') == std::string::npos) {
        throw ConfigError("--set " + entry + ": not of the form key.path=value", ExitCode::usage);
      }
    }
    config = load_config(file, overrides);
    text = to_yaml(config);
  });
  comm.broadcast(text, 0);
  if (comm.rank() != 0) {
    config = parse_config(text, file);
    config.source = file;
  }
  return config;
}

}  // namespace orthrus::cli
