//! seccomp, Landlock, privileges.
