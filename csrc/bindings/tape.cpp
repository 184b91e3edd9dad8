#include "bindings/tape.h"

#include "bindings/bindings.h"

namespace uma {

void bind_tape(pybind11::module_& m) {
  pybind11::class_<Tape>(m, "Tape")
      .def(pybind11::init<>())
      .def("begin", [](Tape& tape) { Tape::recording() = &tape; })
      .def("end", [](Tape&) { Tape::recording() = nullptr; })
      .def("play", &Tape::play, NoGil())
      .def("__len__", &Tape::size);
}

}  // namespace uma
