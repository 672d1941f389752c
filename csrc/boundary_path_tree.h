// Builds the tree of boundary_paths.h; that header alone is what the kernels see, which use no C++ library.
#pragma once
#include <cstddef>
#include <vector>

#include "boundary_paths.h"
#include "common/neighbourhood.h"

namespace wsss {

class PathTreeMaker {
 public:
  PathTreeMaker(int radius, ptrdiff_t line);
  PathTree tree() const;  // valid as long as its maker

 private:
  struct Node {
    PathPoint point;
    int link;
    std::vector<int> children;
  };

  void add_paths(const Neighbourhood& hood);
  void visit(int node, int depth);
  void end_branch(int stop, bool first);
  void look_ahead();
  int index_of(PathPoint point) const;

  ptrdiff_t line_;
  std::vector<Node> nodes_;
  std::vector<PathStep> down_, up_;
  std::vector<PathBranch> branches_;
  std::vector<PathPoint> points_;
};

}  // namespace wsss
