// smpi_platform PROFILE RANKS: the machine of a profile as SimGrid's platform file, one host per
// rank. Every rank has two links of its own, one to its node's ranks and one to all others, each as
// fast as the profile says a rank is; a route is half the latency at either end.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "runtime/machine.hpp"
#include "smpi/host_speed.hpp"

int main(int argc, char** argv) {
  using orthrus::runtime::LinkRate;
  if (argc != 3) {
    std::fprintf(stderr, "usage: smpi_platform PROFILE RANKS\n");
    return 64;
  }
  try {
    const orthrus::runtime::MachineProfile profile = orthrus::runtime::load_profile(argv[1]);
    const int ranks = std::atoi(argv[2]);
    const int node = profile.ranks_per_node;  // 0: all ranks are on one
    const auto link = [](const char* name, int rank, const LinkRate& rate) {
      std::printf(
          "<link id='%s%d' bandwidth='%.9gBps' latency='%.9gs' sharing_policy='SPLITDUPLEX'/>\n",
          name, rank, rate.bytes_per_s.back().rate, rate.latency_s / 2);
    };
    std::printf(
        "<?xml version='1.0'?>\n<!DOCTYPE platform SYSTEM 'https://simgrid.org/simgrid.dtd'>\n"
        "<platform version='4.1'>\n<zone id='machine' routing='Cluster'>\n");
    for (int r = 0; r < ranks; ++r) {
      std::printf("<host id='rank%d' speed='%.9gf'/>\n", r, orthrus::smpi::flops_per_s);
      link("out", r, node > 0 ? profile.network.any : profile.node.any);
      std::printf("<host_link id='rank%d' up='out%d_UP' down='out%d_DOWN'/>\n", r, r, r);
      if (node > 0) link("in", r, profile.node.any);
    }
    for (int r = 0; r < ranks && node > 0; ++r) {
      for (int q = r / node * node; q < ranks && q / node == r / node; ++q) {
        if (q == r) continue;
        std::printf(
            "<bypassRoute src='rank%d' dst='rank%d'><link_ctn id='in%d_UP'/>"
            "<link_ctn id='in%d_DOWN'/></bypassRoute>\n",
            r, q, r, q);
      }
    }
    std::printf("</zone>\n</platform>\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
