// A table of functions, or one, whose source is compiled for each level of the processor: `name`
// stands in the namespace of each one. NEMOCASCADE_LEVELS_OF declares them; levels.h has
// NEMOCASCADE_BEST_OF, the processor's. This header is for what is compiled for a level.
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
