#include "runtime/working_set.hpp"

#include <algorithm>
#include <orthrus/error.hpp>

#include "comm/cost.hpp"
#include "runtime/region.hpp"

namespace orthrus::runtime {

Reserve::Reserve(kernels::Backend& backend, std::size_t bytes)
    : backend_(backend),
      size_(bytes),
      data_(bytes == 0 ? nullptr : static_cast<std::byte*>(backend.reserve(bytes))) {}
Reserve::~Reserve() {
  if (data_ != nullptr) backend_.unreserve(data_, size_);
}

WorkingSet::WorkingSet(const Plan& plan, int rank, std::span<Communicator> levels,
                       kernels::Backend& backend)
    : plan_(plan),
      ways_(levels),
      backend_(backend),
      slot_(plan.slot_of(rank) / plan.replicate),
      slots_(plan.shard),
      levels_(plan.shard_levels()),
      dense_(plan.parameters),
      pieces_(plan.parameters.size()),
      resident_(plan.parameters.size()),
      under_way_(plan.parameters.size()) {
  const WorkSizes& sizes = plan.per_rank[static_cast<std::size_t>(rank)].work;
  std::size_t bytes = 2 * Arena::rounded(sizes.gathered);
  std::vector<std::pair<Index, std::size_t>> kept;  // first element and bytes, per bucket
  for (const Bucket& b : plan.buckets) {
    const Index begin = b.place_of(slot_ * plan.replicate);
    const Index end = b.place_of((slot_ + 1) * plan.replicate);
    kept.emplace_back(begin, static_cast<std::size_t>(end - begin) * bytes_of(b.weights.unit()));
    bytes += Arena::rounded(kept.back().second);
  }
  arena_ = Arena(backend, bytes);
  for (Flight& flight : flights_) {
    flight.staging = arena_.take(sizes.gathered);
    flight.ids.reserve(plan.parameters.size());
    flight.ends.resize(static_cast<std::size_t>(slots_));
  }
  for (std::size_t b = 0; b < plan.buckets.size(); ++b) {
    const Bucket& bucket = plan.buckets[b];
    store_.push_back(arena_.take(kept[b].second).data() -
                     static_cast<std::size_t>(kept[b].first) * bytes_of(bucket.weights.unit()));
    for (const Segment& s : bucket.segments) {
      if (bucket.held || s.size() == 0) continue;
      auto& of = pieces_[static_cast<std::size_t>(s.parameter)];
      of.resize(static_cast<std::size_t>(slots_));
      of[static_cast<std::size_t>(plan.slot_of(s.rank) / plan.replicate)].push_back({b, &s});
    }
  }
  for (ParameterShape& p : dense_) p.strides.clear();
  std::size_t at = 0;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    places_.push_back(at);
    sizes_.push_back(plan.parameters[i].held() ? 0 : plan.gathered_bytes(i));
    at += sizes_.back();
  }
  reserve_ = std::make_unique<Reserve>(backend, at);
  ahead_.reserve(plan.parameters.size());
  order_.reserve(4 * plan.parameters.size());
  last_order_.reserve(4 * plan.parameters.size());
}

/// Sends off as many of `ids` as one staging buffer holds. @return how many.
std::size_t WorkingSet::start(std::span<const int> ids, Flight& flight) {
  flight.ids.clear();
  std::size_t total = 0;
  std::size_t taken = 0;
  for (const int id : ids) {
    const auto i = static_cast<std::size_t>(id);
    if (!resident_[i] && !under_way_[i] && sizes_[i] > 0) {
      if (!flight.ids.empty() && total + plan_.at_rest[i] > flight.staging.size()) break;
      total += plan_.at_rest[i];
      flight.ids.push_back(id);
      under_way_[i] = true;
    }
    ++taken;
  }
  if (flight.ids.empty()) return taken;
  // Slot after slot; of a slot, its pieces of the parameters one after the other.
  std::size_t end = 0;
  for (int slot = 0; slot < slots_; ++slot) {
    for (const int id : flight.ids) {
      const auto& of = pieces_[static_cast<std::size_t>(id)];
      for (const Piece& p : of[static_cast<std::size_t>(slot)]) {
        const Bucket& bucket = plan_.buckets[p.bucket];
        if (slot == slot_) {
          const Region& r = p.segment->region;
          backend_.copy(piece(p.bucket, *p.segment), flight.staging.data() + end,
                        bucket.weights.bytes(r.rows, r.cols));
        }
        end += plan_.piece_bytes(bucket, *p.segment);
      }
    }
    flight.ends[static_cast<std::size_t>(slot)] = static_cast<Index>(end);
  }
  flight.level = levels_;
  advance(flight);
  return taken;
}

void WorkingSet::find_cut(const Flight& flight, std::size_t level) {
  plan_.cut_slots(
      slot_, level, levels_,
      [&](int slot) {
        return slot == 0 ? Index{0} : flight.ends[static_cast<std::size_t>(slot - 1)];
      },
      cut_);
}

/// Waits for the level on its way and starts the next one inward.
void WorkingSet::advance(Flight& flight) {
  try {
    flight.request.wait();
  } catch (const CommError& e) {
    throw CommError(std::string(e.what()) + "; gathering the weights of '" +
                        plan_.parameters[static_cast<std::size_t>(flight.ids.front())].name +
                        "' (" + std::to_string(flight.ids.size()) + " parameters)",
                    e.exit_code());
  }
  if (flight.level == 0) return;
  find_cut(flight, --flight.level);
  const Index own = cut_.own();
  flight.request = ways_[flight.level].start_all_gather(
      {flight.staging.data() + cut_.own_begin(), own, DType::u8}, cut_.counts,
      {flight.staging.data() + cut_.begin, cut_.size, DType::u8});
  expected_ += cost::all_but_own(cut_.size, own, 1, plan_.max_chunk);
}

/// What has arrived becomes whole tensors.
void WorkingSet::land(Flight& flight) {
  if (flight.ids.empty()) return;
  while (flight.level > 0) advance(flight);
  advance(flight);
  for (const int id : flight.ids) {
    const auto i = static_cast<std::size_t>(id);
    reserve_->back(places_[i], sizes_[i]);
  }
  std::size_t at = 0;
  for (int slot = 0; slot < slots_; ++slot) {
    for (const int id : flight.ids) {
      const auto i = static_cast<std::size_t>(id);
      for (const Piece& p : pieces_[i][static_cast<std::size_t>(slot)]) {
        const Bucket& bucket = plan_.buckets[p.bucket];
        put(bucket.weights, flight.staging.data() + at, i, p.segment->region);
        at += plan_.piece_bytes(bucket, *p.segment);
      }
    }
  }
  for (const int id : flight.ids) {
    const auto i = static_cast<std::size_t>(id);
    under_way_[i] = false;
    resident_[i] = true;
  }
  flight.ids.clear();
}

/// A piece of parameter i goes where it is whole.
void WorkingSet::put(const WeightFormat& format, void* piece, std::size_t i, const Region& region) {
  if (!dense_[i].as_codes) {
    return read_piece(format, piece, dense_[i], weights(i), dense_[i].dtype, region, backend_);
  }
  copy_codes(format.view(piece, region.rows, region.cols), *format.grid,
             block(plan_.whole_codes(i, weights(i)), *format.grid, region), backend_);
}

void WorkingSet::gather(std::span<const int> ids) {
  const auto needed = [&] {
    std::int64_t more = 0;
    for (const int id : ids) {
      const auto i = static_cast<std::size_t>(id);
      if (!resident_[i] && !under_way_[i]) more += static_cast<std::int64_t>(sizes_[i]);
    }
    return more;
  };
  std::int64_t more = needed();
  if (plan_.working_set > 0 && resident_bytes_ + more > plan_.working_set &&
      !flights_[1].ids.empty()) {
    // What was fetched ahead and is not wanted after all makes room.
    ahead_.assign(flights_[1].ids.begin(), flights_[1].ids.end());
    land(flights_[1]);
    for (const int id : ahead_) {
      if (std::find(ids.begin(), ids.end(), id) == ids.end()) release({&id, 1});
    }
    more = needed();
  }
  if (plan_.working_set > 0 && resident_bytes_ + more > plan_.working_set) {
    throw ConfigError("zero.working_set: gathering '" +
                      plan_.parameters[static_cast<std::size_t>(ids.front())].name + "' and " +
                      std::to_string(ids.size() - 1) + " more would make " +
                      std::to_string(resident_bytes_ + more) + " bytes, the working set has " +
                      std::to_string(plan_.working_set) + "; release first what is not used");
  }
  resident_bytes_ += more;
  order_.insert(order_.end(), ids.begin(), ids.end());
  land(flights_[1]);
  while (!ids.empty()) {
    ids = ids.subspan(start(ids, flights_[0]));
    land(flights_[0]);
  }
  fetch_ahead();
}

/// The next parameters of the last step's order, if it was the same until here and there is room.
void WorkingSet::fetch_ahead() {
  const std::size_t n = order_.size();
  if (last_order_.size() <= n || !std::equal(order_.begin(), order_.end(), last_order_.begin())) {
    return;
  }
  std::int64_t room = plan_.working_set > 0 ? plan_.working_set - resident_bytes_ : INT64_MAX;
  std::size_t count = 0;
  std::size_t total = 0;
  for (std::size_t k = n; k < last_order_.size(); ++k, ++count) {
    const auto i = static_cast<std::size_t>(last_order_[k]);
    if (resident_[i] || under_way_[i]) break;  // still in use: it comes later
    if (static_cast<std::int64_t>(sizes_[i]) > room ||
        total + plan_.at_rest[i] > flights_[1].staging.size()) {
      break;
    }
    room -= static_cast<std::int64_t>(sizes_[i]);
    total += plan_.at_rest[i];
    resident_bytes_ += static_cast<std::int64_t>(sizes_[i]);
  }
  if (count > 0) static_cast<void>(start(std::span(last_order_).subspan(n, count), flights_[1]));
}

void WorkingSet::release(std::span<const int> ids) {
  for (const int id : ids) {
    const auto i = static_cast<std::size_t>(id);
    if (!resident_[i]) continue;
    resident_[i] = false;
    resident_bytes_ -= static_cast<std::int64_t>(sizes_[i]);
    reserve_->drop(places_[i], sizes_[i]);
  }
}

void WorkingSet::release_all() {
  for (Flight& flight : flights_) land(flight);
  for (std::size_t i = 0; i < resident_.size(); ++i) {
    const int id = static_cast<int>(i);
    release({&id, 1});
  }
  std::swap(order_, last_order_);
  order_.clear();
}

}  // namespace orthrus::runtime
