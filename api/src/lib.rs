//! REST, QMP, command line.
