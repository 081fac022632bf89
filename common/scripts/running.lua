#!lua flags=no-writes,allow-oom
-- Jobs that workers have, those first that were claimed first.
-- ARGV  1 most jobs in the answer  2 most jobs looked at
-- Reply {described job ...}
--@include base
--@include jobs
local found, most = {}, tonumber(ARGV[2])
for _, wid in ipairs(call('ZREVRANGE', P .. 'wl', 0, -1)) do
  for _, id in ipairs(call('HKEYS', P .. 'w:' .. wid)) do
    if #found == most then break end
    found[#found + 1] = { id, tonumber(call('HGET', P .. 'j:' .. id, 'sc') or nil) or math.huge }
  end
end
table.sort(found, function(a, b)
  if a[2] ~= b[2] then return a[2] < b[2] end
  return a[1] < b[1]
end)
local described = {}
for i = 1, math.min(#found, tonumber(ARGV[1])) do
  local j = load(found[i][1])
  if j then described[#described + 1] = describe(j) end -- nil: its hash was deleted by hand
end
return described
