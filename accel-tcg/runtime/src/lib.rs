//! Translated vCPUs: TLB, code cache, dispatch, chaining, self-modifying code.
