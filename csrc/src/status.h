// Error text of a thread: one line with library, call, shape, status.
#pragma once

#include <stdexcept>
#include <string>

#include "slidesparse_gemm.h"

namespace slidesparse {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A library lacks this on this GPU: nothing is broken.
struct Unsupported : Error {
  using Error::Error;
};

const char* type_name(int type);
std::string describe(const ss_problem& problem);
void set_error(const std::string& text);

// Run `body`, turning an exception into -1 (Unsupported: -2) and the thread's error text: no C++ exception crosses the
// C interface.
template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const Unsupported& error) {
    set_error(error.what());
    return -2;
  } catch (const std::exception& error) {
    set_error(error.what());
    return -1;
  }
}

}  // namespace slidesparse
