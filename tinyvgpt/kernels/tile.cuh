// Tiles in shared memory: rows of D 16-bit numbers, in chunks of 8 (16 bytes), arranged so that the
// eight rows that one matrix load reads lie in eight different groups of banks. Chapter 13.
//
// Shared memory has 32 banks of 4 bytes, so 8 chunks side by side fill all banks. Where D is a
// multiple of 64 the rows of a column of chunks would all meet in one group: chunk c of row r lies
// at c ^ (r % 8) instead (a swizzle). Other D are given one chunk of padding a row, which makes a
// row's number of chunks odd, and eight rows of a column of chunks then differ by themselves.

template <int D> struct Tile {
    static constexpr int stride = D % 64 ? D + 8 : D;  // numbers from a row to the next
    // Where chunk `chunk` (numbers 8·chunk … 8·chunk + 7) of a row begins.
    static __device__ __forceinline__ int at(int row, int chunk) {
        return row * stride + (D % 64 ? chunk : chunk ^ (row & 7)) * 8;
    }
};
