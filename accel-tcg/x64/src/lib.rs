//! x86-64 code generation for the translator's IR.
