// A function or a table of functions, compiled for each level of the processor: `name` is in the
// namespace of each level. NEMOCASCADE_LEVELS_OF declares them; NEMOCASCADE_BEST_OF of levels.h
// selects the processor's. This header is for code that is compiled for a level.
#pragma once

#ifdef NEMOCASCADE_X86_LEVELS
#define NEMOCASCADE_LEVELS_OF(Table, name) \
  namespace level_base {                   \
  extern const Table name;                 \
  }                                        \
  namespace level_v3 {                     \
  extern const Table name;                 \
  }                                        \
  namespace level_v4 {                     \
  extern const Table name;                 \
  }
#else
#define NEMOCASCADE_LEVELS_OF(Table, name) \
  namespace level_base {                   \
  extern const Table name;                 \
  }
#endif
