#include "threads.h"

namespace kernels {
Team team = nullptr;
}

extern "C" void set_team(kernels::Team parallel) { kernels::team = parallel; }
