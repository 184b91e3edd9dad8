// Loops that do nothing but one kind of work, as fast as this machine can: what every bench row is measured against.
// Knows instructions; does not know clocks.
#pragma once
#include <cstdint>

#include "uma/isa.h"

namespace uma {

struct CeilingOps {
  // Each runs `rounds` rounds on the calling thread and returns how many operations (a multiply and an add are two) or
  // bytes that was; 0 where the instruction set has no such instruction. `sink` keeps the compiler honest.
  double (*fp32_fma)(int64_t rounds, float* sink);
  double (*int16_madd)(int64_t rounds, float* sink);       // 16 x 16 bits, 32-bit sums
  double (*int8_madd)(int64_t rounds, float* sink);        // 8 x 8 bits, 32-bit sums
  double (*int4_madd)(int64_t rounds, float* sink);        // 4 x 8 bits, 16-bit sums widened every 4th round
  double (*int16_vnni)(int64_t rounds, float* sink);       // multiply, add in pairs and accumulate in one instruction
  double (*int8_vnni)(int64_t rounds, float* sink);        // likewise in fours
  double (*read)(const float* from, int64_t floats, float* sink);
  double (*copy)(const float* from, float* to, int64_t floats);
};

UMA_DECLARE_PER_ISA(const CeilingOps& ceiling_ops();)

}  // namespace uma
