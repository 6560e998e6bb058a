//! The block layer: knows no VM.
