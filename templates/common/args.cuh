// ---- Arguments: one struct by value, laid out by the planner --------------------------------------------------------
//% for struct in structs
struct ${struct.name} {
//% for field in struct.fields
  ${field.declaration};  // ${field.doc}
//% endfor
};
static_assert(sizeof(${struct.name}) == ${struct.size}, "${struct.name} must match the layout the launcher packs");

//% endfor
