#!lua flags=allow-oom
-- Jobs as stored: those named, or the live ones that end first.
-- ARGV  1 tenant  2 '1': any tenant (an operator)  3 most live jobs, 0 for the named  then ids
-- Reply {described job ...}; those of other tenants are left out like those that do not exist.
--@include base
--@include jobs
local ids, found = {}, {}
if tonumber(ARGV[3]) > 0 then
  ids = call('ZRANGE', P .. 'dl', 0, ARGV[3] - 1)
else
  for i = 4, #ARGV do ids[i - 3] = ARGV[i] end
end
for _, id in ipairs(ids) do
  local j = (ARGV[2] == '1' or is_of(id, ARGV[1])) and load(id)
  if j then found[#found + 1] = describe(j) end
end
return found
