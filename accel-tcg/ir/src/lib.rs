//! The translator's typed intermediate representation.
