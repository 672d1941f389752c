#include "boundary_path_tree.h"

#include <algorithm>

namespace wsss {

namespace {

constexpr size_t kLinksAhead = 4;  // 100 to 200 ns, what memory takes to answer

bool row_major(PathPoint a, PathPoint b) { return a.dy != b.dy ? a.dy < b.dy : a.dx < b.dx; }
bool same(PathPoint a, PathPoint b) { return a.dy == b.dy && a.dx == b.dx; }

// Points of the path to (dy, dx) from the pixel outwards: where two maxima are equal, the later one counts.
std::vector<PathPoint> path_to(int dy, int dx) {
  std::vector<PathPoint> path;
  const int side = dx < 0 ? -1 : 1;
  for (int y = 0; y <= dy; ++y) {
    for (int x = std::min(0, dx); x <= std::max(0, dx); ++x) {
      const int across = dy * x - dx * y;
      if (across * across < dy * dy + dx * dx) path.push_back({y, x});
    }
  }
  std::stable_sort(path.begin(), path.end(), [side](PathPoint a, PathPoint b) {
    return a.dy + side * a.dx > b.dy + side * b.dx;  // |dy| + |dx|, since a path stays on its side
  });
  std::reverse(path.begin(), path.end());
  return path;
}

}  // namespace

PathTreeMaker::PathTreeMaker(int radius, ptrdiff_t line) : line_(line) {
  add_paths(make_neighbourhood(radius));
  for (const Node& node : nodes_) points_.push_back(node.point);
  std::sort(points_.begin(), points_.end(), row_major);
  points_.erase(std::unique(points_.begin(), points_.end(), same), points_.end());
  if (!nodes_[0].children.empty()) visit(0, 0);
  look_ahead();
}

PathTree PathTreeMaker::tree() const {
  return {down_.data(),          up_.data(),          branches_.data(), points_.data(), int(down_.size()),
          int(branches_.size()), int(points_.size()), index_of({0, 0})};
}

void PathTreeMaker::look_ahead() {
  std::vector<PathStep*> ends;
  for (PathStep& step : up_) {
    if (step.link >= 0) ends.push_back(&step);
  }
  for (size_t i = 0; i < ends.size(); ++i) ends[i]->soon = ends[std::min(i + kLinksAhead, ends.size() - 1)]->link;
}

int PathTreeMaker::index_of(PathPoint point) const {
  return int(std::lower_bound(points_.begin(), points_.end(), point, row_major) - points_.begin());
}

void PathTreeMaker::add_paths(const Neighbourhood& hood) {
  nodes_ = {{{0, 0}, -1, {}}};
  for (int k = 0; k < hood.count; ++k) {
    const std::vector<PathPoint> path = path_to(hood.dy[k], hood.dx[k]);
    int at = 0;
    for (size_t i = 1; i < path.size(); ++i) {
      const std::vector<int>& children = nodes_[at].children;
      const auto child =
          std::find_if(children.begin(), children.end(), [&](int c) { return same(nodes_[c].point, path[i]); });
      if (child != children.end()) {
        at = *child;
      } else {
        nodes_[at].children.push_back(int(nodes_.size()));
        at = int(nodes_.size());
        nodes_.push_back({path[i], -1, {}});
      }
    }
    nodes_[at].link = k;
  }
}

void PathTreeMaker::visit(int index, int depth) {
  const std::vector<int>& children = nodes_[index].children;
  for (size_t i = 0; i < children.size(); ++i) {
    if (i > 0) end_branch(depth, i == 1);
    if (i > 0 || depth == 0) branches_.push_back({int(down_.size()), 0, int(up_.size()), 0, 0, false});
    const Node& child = nodes_[children[i]];
    const PathStep step{child.point.dy * line_ + child.point.dx,
                        index_of(child.point),
                        child.point.dx,
                        child.link,
                        depth + 1,
                        child.children.size() > 1};
    down_.push_back(step);
    visit(children[i], depth + 1);
    up_.push_back(step);
  }
  if (depth == 0) end_branch(0, children.size() == 1);
}

void PathTreeMaker::end_branch(int stop, bool first) {
  PathBranch& branch = branches_.back();
  branch.down_end = int(down_.size());
  branch.up_end = int(up_.size());
  branch.stop = stop;
  branch.first = first;
}

}  // namespace wsss
