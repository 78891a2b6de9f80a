"""C for CPUs, where torch has nothing that is quick; compiled by the machine's compiler when it is needed."""
