# A guest to be debugged: it counts until somebody sets `done`, then switches itself off. It starts by the PVH boot
# protocol, in 32-bit protected mode.
        .section .note.Xen, "a", @note
        .long   4, 8, 18                # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .quad   _start

        .text
        .code32
        .globl  _start, again, bump, after_bump, over, spare0, spare1, spare2, spare3, counter, copy, done
        .type   _start, @function
        .type   bump, @function
_start: movl    $stack, %esp
        xorl    %ebx, %ebx
again:  call    bump
after_bump:
        movl    counter, %eax
        movl    %eax, copy
        cmpl    $0, done
        je      again
over:   movw    $0x604, %dx             # PM1a_CNT: SLP_EN with the SLP_TYP of S5
        movw    $0x2000, %ax
        outw    %ax, %dx
0:      jmp     0b
bump:   incl    %ebx
        incl    counter
        ret
        .size   bump, . - bump
# Never reached.
spare0: nop
spare1: nop
spare2: nop
spare3: nop

        .data
        .balign 8
counter: .long  0
copy:   .long   0
done:   .long   0
        .bss
        .balign 16
        .skip   4096
stack:
